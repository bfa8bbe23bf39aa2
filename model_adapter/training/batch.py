"""A step's tensors: three streams of packed sequences, and who is whose gold document.

On a GPU every stream has the same number of tokens at every step, filled up with sequences
that nothing looks at, so that compiled code is compiled once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from model_adapter.msa.packed import moved
from model_adapter.training.corpus import Corpus
from model_adapter.training.sampler import AnswerRow, Drawn, pad_to
from model_adapter.training.settings import Settings


@dataclass(frozen=True)
class Stream:
    """Packed sequences. lengths: of all, filler included; used: how many are no filler;
    end: above all positions."""

    ids_T: torch.Tensor
    positions_T: torch.Tensor
    end: int
    lengths: tuple[int, ...]
    used: int


@dataclass(frozen=True)
class Batch:
    """documents and queries route; answers are read out at at_A, where targets_A come next.

    slots_QS: places of voting tokens in the query stream, votes_QS: which of them are real;
    place_T: where in slots_QS (q * S + s) each token of that stream votes, Q * S if it does not.
    teacher_QD: MiniLM's cosines; words_QD: BM25, from 0 to 1.
    """

    documents: Stream
    queries: Stream
    answers: Stream | None
    slots_QS: torch.Tensor
    votes_QS: torch.Tensor
    place_T: torch.Tensor
    positive_QD: torch.Tensor
    ignored_QD: torch.Tensor
    teacher_QD: torch.Tensor | None
    words_QD: torch.Tensor | None
    at_A: torch.Tensor
    targets_A: torch.Tensor

    @property
    def streams(self) -> list[Stream]:
        """Those that there are."""
        return [s for s in (self.documents, self.queries, self.answers) if s is not None]

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        found: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, torch.Tensor):
                found[item.name] = moved(value, device)
            elif isinstance(value, Stream):
                found[item.name] = replace(
                    value,
                    ids_T=moved(value.ids_T, device),
                    positions_T=moved(value.positions_T, device),
                )
        return replace(self, **found)


class Batcher:
    """Makes batches of drawn places. head: tokens before a question; constant: fill up."""

    def __init__(
        self, corpus: Corpus, settings: Settings, head: Sequence[int], *, constant: bool
    ) -> None:
        self._corpus, self._settings, self._constant = corpus, settings, constant
        self._head = tuple(head)

    def make(self, drawn: Drawn, rows: Sequence[AnswerRow]) -> Batch:
        """The tensors of a step, on the CPU."""
        s = self._settings
        asked = [self._corpus.queries[n] for n in drawn.queries]
        documents = self._stream(
            [self._corpus.tokens[n] for n in drawn.documents], s.document_tokens, s.max_document
        )
        gap = len(self._head) + s.top_k
        queries = self._stream(
            [(*self._head, *query.ids) for query in asked],
            s.query_tokens,
            len(self._head) + s.max_question,
            (len(self._head), gap),
        )
        slots_QS, votes_QS = self._slots([len(query.ids) for query in asked])
        place_T = np.full(len(queries.ids_T), slots_QS.size)
        place_T[slots_QS[votes_QS]] = np.flatnonzero(votes_QS)
        at, targets = _targets(rows)
        positive_QD, ignored_QD = self._relevance(drawn)
        answers = None
        if rows:
            answers = self._stream([row.ids for row in rows], s.answer_tokens, s.max_answer_row)
        return Batch(
            documents=documents,
            queries=queries,
            answers=answers,
            slots_QS=torch.from_numpy(slots_QS),
            votes_QS=torch.from_numpy(votes_QS),
            place_T=torch.from_numpy(place_T),
            positive_QD=positive_QD,
            ignored_QD=ignored_QD,
            teacher_QD=self._teacher(drawn),
            words_QD=self._words(drawn),
            at_A=torch.tensor(at, dtype=torch.long),
            targets_A=torch.tensor(targets, dtype=torch.long),
        )

    def _stream(
        self,
        sequences: Sequence[Sequence[int]],
        total: int,
        longest: int,
        jump: tuple[int, int] | None = None,
    ) -> Stream:
        """jump: (n, p): from its n-th token on a sequence stands at positions from p."""
        lengths = [len(sequence) for sequence in sequences]
        filler = pad_to(lengths, total, longest) if self._constant else []
        ids = np.full(sum(lengths) + sum(filler), sequences[0][0])
        ids[: sum(lengths)] = np.fromiter(chain.from_iterable(sequences), np.int64, sum(lengths))
        places = [np.arange(length) for length in (*lengths, *filler)]
        if jump is not None:
            after, position = jump
            places = [np.where(n < after, n, n - after + position) for n in places]
        return Stream(
            ids_T=torch.from_numpy(ids),
            positions_T=torch.from_numpy(np.concatenate(places)),
            end=max(int(place[-1]) for place in places) + 1,
            lengths=(*lengths, *filler),
            used=len(lengths),
        )

    def _slots(self, lengths: Sequence[int]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        count, head = np.array(lengths), len(self._head)
        starts = np.cumsum(count + head) - count
        place = np.arange(self._settings.max_question if self._constant else int(count.max()))
        votes = place[None, :] < count[:, None]
        slots = np.where(votes, starts[:, None] + place[None, :], starts[:, None])
        return slots, votes

    def _relevance(self, drawn: Drawn) -> tuple[torch.Tensor, torch.Tensor]:
        corpus = self._corpus
        place = {document: n for n, document in enumerate(drawn.documents)}
        positive = np.zeros((len(drawn.queries), len(drawn.documents)), dtype=bool)
        gold = [corpus.queries[n].gold for n in drawn.queries]
        for row, documents in enumerate(gold):
            positive[row, [place[document] for document in documents]] = True
        first = np.array([documents[0] for documents in gold])
        source, scope = corpus.source_N, corpus.scope_N
        drawn_D = np.array(drawn.documents)
        # A question of one conversation is no question about another one of its set.
        same_set = source[first][:, None] == source[drawn_D][None, :]
        other_scope = scope[first][:, None] != scope[drawn_D][None, :]
        _, texts = np.unique(
            [corpus.documents[n].text for n in drawn.documents], return_inverse=True
        )
        twins = positive.astype(np.float32) @ (texts[:, None] == texts[None, :]).astype(np.float32)
        ignored = (same_set & other_scope) | (twins > 0)
        return torch.from_numpy(positive), torch.from_numpy(ignored & ~positive)

    def _teacher(self, drawn: Drawn) -> torch.Tensor | None:
        corpus = self._corpus
        if corpus.document_vectors is None or corpus.query_vectors is None:
            return None
        documents = corpus.document_vectors[drawn.documents].astype(np.float32)
        return torch.from_numpy(
            corpus.query_vectors[drawn.queries].astype(np.float32) @ documents.T
        )

    def _words(self, drawn: Drawn) -> torch.Tensor | None:
        if self._corpus.words is None:
            return None
        return torch.from_numpy(self._corpus.words.scores(drawn.queries, drawn.documents))


def _targets(rows: Sequence[AnswerRow]) -> tuple[list[int], list[int]]:
    """Places whose next token is learned, and those tokens."""
    at: list[int] = []
    targets: list[int] = []
    first = 0
    for row in rows:
        start = len(row.ids) - row.targets
        at += range(first + start - 1, first + len(row.ids) - 1)
        targets += row.ids[start:]
        first += len(row.ids)
    return at, targets
