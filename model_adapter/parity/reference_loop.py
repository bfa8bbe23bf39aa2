"""One call of the published generation loop: lock step, pauses, injected segments.

This reproduces what was published, its oddities included, to be compared with its
golden vectors. The product's loop is model_adapter.msa.interleave.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from model_adapter.msa.config import QueryReduce
from model_adapter.msa.forward import Attend, RoutingRequest, Row, Segment, run
from model_adapter.msa.routing import Scores, select
from model_adapter.parity.reference_text import (
    LONG_RESPONSE,
    PAD,
    REFERENCE_END,
    RETRIEVAL_END,
    ReferenceRow,
    decode,
    encode,
    fetched,
    question_segment,
)
from model_adapter.parity.source import Setup


class ReferenceCrashError(Exception):
    """The published loop fails here."""


@dataclass(frozen=True)
class Forward:
    """One forward call of the batch. live: rows whose values mean something, that is,
    those that had not ended before."""

    input_ids: list[list[int]]
    position_ids: list[list[int]]
    attention_mask: list[list[int]]
    live: list[bool]
    logits_BV: torch.Tensor


@dataclass
class _Row:
    """State of one row within a call. output: (token, seen by attention)."""

    row: Row
    output: list[tuple[int, bool]]
    token: int = -1
    response: str = ""
    fed: bool = True
    round_end: bool = False
    retrieval_end: bool = False
    finished: bool = False
    scores_N: dict[int, Scores] = field(default_factory=dict)

    @property
    def idle(self) -> bool:
        return self.round_end or self.retrieval_end


class Call:
    """Prefill and decoding of a batch until a pause or its end."""

    def __init__(
        self,
        setup: Setup,
        prompts: Sequence[ReferenceRow],
        *,
        k: int,
        new_tokens: int,
        golden_routing: Sequence[Mapping[int, Sequence[int]]] | None = None,
    ) -> None:
        self.batch = len(prompts)
        self.forwards = 0
        self.ended = False
        self.empty_segment = False
        #: False once pad tokens of ended rows would be part of the raw output.
        self.comparable_output = True
        self._setup, self._prompts, self._k = setup, prompts, k
        self._new_tokens, self._golden = new_tokens, golden_routing
        self._pad = encode(setup.tokenizer, PAD)[0]
        self._width = max(len(prompt.ids) for prompt in prompts)
        self._rows = [
            _Row(
                setup.row(k),
                [(self._pad, False)] * (self._width - len(prompt.ids))
                + [(token, True) for token in prompt.ids],
            )
            for prompt in prompts
        ]
        self._closing = 0  # the state whose discarded forward comes next
        self._segment: list[list[int]] | None = None
        self._injected = False
        self._logits_BV: torch.Tensor | None = None

    def padded(self) -> dict[str, list[list[int]]]:
        """The left-padded batch as the prefill sees it."""
        found: dict[str, list[list[int]]] = {
            "input_ids": [],
            "doc_ids": [],
            "position_ids": [],
            "attention_mask": [],
        }
        first = len(self._setup.head) + self._k
        for prompt in self._prompts:
            size = len(prompt.ids)
            pads = self._width - size
            found["input_ids"].append([self._pad] * pads + prompt.ids)
            found["doc_ids"].append([0] * pads + prompt.markers)
            found["position_ids"].append([first] * pads + list(range(first, first + size)))
            found["attention_mask"].append([0] * pads + [1] * size)
        return found

    def forward(self, tokens: Sequence[int]) -> Forward | None:
        """Runs the next forward call and goes on with `tokens`, one for each row,
        whatever its logits say; None when the call is over."""
        if self.ended:
            return None
        live = [not row.finished or row.fed is False for row in self._rows]
        if self.forwards == 0:
            inputs = self._prefill()
        elif self._segment is not None:
            inputs = self._run_segment(self._segment)
        else:
            inputs = self._decode()
        assert self._logits_BV is not None
        self.forwards += 1
        self._advance(tokens)
        return Forward(*inputs, live=live, logits_BV=self._logits_BV)

    def ranking(self, row: int, layer: int, k: int) -> tuple[list[int], Scores]:
        """Our own choice in a routed layer, and all scores."""
        scores_N = self._rows[row].scores_N.get(layer)
        if scores_N is None:
            return [], np.full(len(self._setup.texts), -np.inf, dtype=np.float32)
        return ([int(n) for n in select(scores_N, k)] if k else []), scores_N

    def texts(self) -> list[str]:
        """What the call returns: output sorted by mask, as text with control tokens."""
        return [
            decode(
                self._setup.tokenizer,
                [t for t, seen in row.output if not seen] + [t for t, seen in row.output if seen],
            )
            for row in self._rows
        ]

    def _prefill(self) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
        segments = []
        for place, (row, prompt) in enumerate(zip(self._rows, self._prompts, strict=True)):
            votes = [marker == 0 for marker in prompt.markers]
            last = None
            if self._setup.config.msa.query_reduce is QueryReduce.LAST:
                last = sum(votes) - 1 - (self._width - len(prompt.ids))
            forced = None
            if self._golden is not None:
                forced = {
                    layer: np.array(chosen, dtype=np.int64)
                    for layer, chosen in self._golden[place].items()
                }
            request = RoutingRequest(self._setup.memory, votes, self._k, last, forced)
            segments.append(Segment(row.row, prompt.ids, request))
        outcome = run(self._setup.decoder, segments)
        self._logits_BV = outcome.logits
        for row, found in zip(self._rows, outcome.routings, strict=True):
            assert found is not None
            row.scores_N = found.scores_N
        padded = self.padded()
        return padded["input_ids"], padded["position_ids"], padded["attention_mask"]

    def _decode(self) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
        """One token per row. A paused row feeds its last token once more and then again
        and again without leaving a trace."""
        segments, positions = [], []
        for row in self._rows:
            attend = Attend.GHOST if row.fed else Attend.CAUSAL
            if row.fed:
                row.row.position -= 1
            positions.append([row.row.position])
            segments.append(Segment(row.row, [row.token], attend=attend))
        masks = [[0 if row.fed else 1] for row in self._rows]
        self._logits_BV = run(self._setup.decoder, segments).logits
        for row in self._rows:
            if row.fed:
                row.row.position += 1
                row.output.append((row.token, False))
            row.fed = True
        return [[row.token] for row in self._rows], positions, masks

    def _run_segment(
        self, segments: list[list[int]]
    ) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
        """Stage 3: the segment, left-padded; its tokens all see each other."""
        self._segment, self._injected = None, True
        width = max(len(ids) for ids in segments)
        inputs, positions, masks, work = [], [], [], []
        for row, ids in zip(self._rows, segments, strict=True):
            pads = width - len(ids)
            first = row.row.position - pads
            inputs.append([self._pad] * pads + ids)
            positions.append(list(range(first, first + width)))
            masks.append([0] * pads + [1] * len(ids))
            row.output += [(self._pad, False)] * pads + [(token, True) for token in ids]
            if ids:
                work.append(Segment(row.row, ids, attend=Attend.BIDIRECTIONAL))
            else:
                ghost = Row(row.row.cache, row.row.position - 1)
                work.append(Segment(ghost, [self._pad], attend=Attend.GHOST))
        self._logits_BV = run(self._setup.decoder, work).logits
        return inputs, positions, masks

    def _advance(self, chosen: Sequence[int]) -> None:
        if self._closing == 2:
            self._pause()
            return
        if self._closing == 3:
            self._closing = 0
            self._open_answer()
            return
        ending = [
            (row, token)
            for row, token in zip(self._rows, chosen, strict=True)
            if self._take(row, token)
        ]
        waiting = [row for row in self._rows if not row.finished]
        for row, token in ending if waiting else []:
            # A row's last token is part of the output only while others still run.
            row.token, row.fed = token, False
            row.output.append((token, True))
        if not waiting or self.forwards > self._new_tokens:
            self.ended = True
        elif not self._injected and all(row.retrieval_end for row in waiting):
            self._closing = 3
        elif not self._injected and all(row.idle for row in waiting):
            self._closing = 2

    def _take(self, row: _Row, token: int) -> bool:
        """Appends a row's new token and raises its flags. True when the row ends by it."""
        if row.finished:
            self.comparable_output = False
            return False
        row.response += decode(self._setup.tokenizer, [token])
        if row.idle and not self._injected:
            return False
        if token in self._setup.eos_ids:
            row.finished = True
            return True
        row.token, row.fed = token, False
        if self.forwards <= self._new_tokens:
            row.output.append((token, True))
        if not self._injected:
            row.round_end |= REFERENCE_END in row.response
            row.retrieval_end |= RETRIEVAL_END in row.response
            row.retrieval_end |= len(row.response) > LONG_RESPONSE
        return False

    def _pause(self) -> None:
        """State 2: the documents' text joins the output, unrun, and the call ends."""
        texts = [fetched(row.response, self._seen(row), self._setup.texts) for row in self._rows]
        runs = [encode(self._setup.tokenizer, text) for text in texts]
        width = max(len(ids) for ids in runs)
        for row, ids in zip(self._rows, runs, strict=True):
            row.output += [(self._pad, False)] * (width - len(ids))
            row.output += [(token, True) for token in ids]
        self.ended = True

    def _open_answer(self) -> None:
        """State 3: the question again, for rows that asked for it by its marker."""
        self._segment = [
            encode(self._setup.tokenizer, question_segment(self._seen(row)))
            if RETRIEVAL_END in row.response
            else []
            for row in self._rows
        ]
        if not any(self._segment):
            self.empty_segment = True
            raise ReferenceCrashError("an empty segment")

    def _seen(self, row: _Row) -> str:
        return decode(self._setup.tokenizer, [token for token, seen in row.output if seen])
