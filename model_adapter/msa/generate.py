"""What every running answer has in common: limits, documents that fit, the decode loop.

A session says which tokens to run next (`segment`) and takes the result (`accept`);
the engine runs the segments of all sessions together. A session computes nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer

from model_adapter.engine import (
    Counts,
    Event,
    FinishEvent,
    FinishReason,
    Generate,
    MemoryView,
    RoutingEvent,
    TextEvent,
)
from model_adapter.msa import ranking
from model_adapter.msa.forward import Attend, Row, RowRouting, Segment, new_row
from model_adapter.msa.model import Decoder
from model_adapter.msa.pool import Cache
from model_adapter.msa.prompt import PromptBuilder, Template
from model_adapter.msa.sampling import Detokeniser, Sampler


@dataclass(frozen=True)
class Limits:
    """Bounds of one engine. Tokens; positions bound a row, whatever fills it."""

    document_tokens: int
    question_tokens: int
    answer_tokens: int
    positions: int
    rounds: int


@dataclass(frozen=True)
class Model:
    """What sessions need of a loaded model."""

    decoder: Decoder
    tokenizer: Tokenizer
    prompts: PromptBuilder
    prefix: Cache
    eos_ids: frozenset[int]
    limits: Limits
    #: Every chat turn with documents begins with these tokens (none for INTERLEAVE), run already.
    opening: Sequence[int]
    opened: Cache
    #: CAUSAL, or BIDIRECTIONAL as the published loop has it: who sees whom in the
    #: question that is put in again.
    injection: Attend = Attend.CAUSAL

    @property
    def template(self) -> Template:
        """Formats and control tokens."""
        return self.prompts.template

    def chat_row(self, ids: Sequence[int]) -> tuple[Row, list[int]]:
        """A row for a chat turn, and what of its tokens is still to be run."""
        known = len(self.opening)
        if not known or list(ids[:known]) != list(self.opening):
            return new_row(self.decoder), list(ids)
        return new_row(self.decoder, self.opened, known), list(ids[known:])

    def question_row(self, k: int) -> Row:
        """A row behind the template prefix; questions stand at positions from head + k."""
        return new_row(self.decoder, self.prefix, len(self.template.head) + k)


@dataclass(frozen=True)
class Told:
    """What is known of logits without looking at them again. best: the likeliest token. share: the
    probability of the token that was wondered about."""

    best: int | None = None
    share: float | None = None


NOTHING_TOLD = Told()


class Session(ABC):
    """One running query."""

    def __init__(self, model: Model, request: Generate, memory: MemoryView) -> None:
        self.counts = Counts(question_tokens=len(model.prompts.text(request.question)))
        self._model, self._request, self._memory = model, request, memory
        limit = model.limits.answer_tokens
        self._answer_limit = min(request.max_answer_tokens or limit, limit)
        self._k = request.top_k or model.decoder.config.msa.top_k
        self._sampler = Sampler(request.temperature, request.top_p, request.seed)
        self._done = False
        self._upcoming: Segment | None = None

    @property
    def done(self) -> bool:
        """True after the FinishEvent was produced."""
        return self._done

    @property
    def only_routes(self) -> bool:
        """The next segment is run for its routing alone."""
        return False

    @property
    def samples(self) -> bool:
        """Tokens are drawn from the logits: they are best handed over in RAM."""
        return self._request.temperature > 0

    @property
    def wonders(self) -> int | None:
        """The token whose probability behind the next segment is wanted."""
        return None

    def upcoming(self) -> Segment:
        """The next segment, the same until it is run."""
        if self._upcoming is None:
            self._upcoming = self.segment()
        return self._upcoming

    def advance(
        self, logits_V: torch.Tensor | None, routing: RowRouting | None, told: Told
    ) -> list[Event]:
        """Takes the result of `upcoming`; see accept."""
        self._upcoming = None
        return self.accept(logits_V, routing, told)

    @abstractmethod
    def segment(self) -> Segment:
        """What to run next. Called once before each accept."""

    @abstractmethod
    def accept(
        self, logits_V: torch.Tensor | None, routing: RowRouting | None, told: Told = NOTHING_TOLD
    ) -> list[Event]:
        """Takes the result of the segment: fp32 logits [V] after it, and its routing."""

    def fail(self) -> None:
        """Ends the session without further events."""
        self._done = True

    def _finish(self, reason: FinishReason, text: str = "") -> list[Event]:
        self._done = True
        events: list[Event] = [TextEvent(text)] if text else []
        return [*events, FinishEvent(reason)]

    def _take_routing(self, routing: RowRouting, *, by_rank: bool) -> RoutingEvent:
        """Counts a round's routing. by_rank: the k best over all layers and the question's
        words, instead of all that some layer chose."""
        self.counts.rounds += 1
        self.counts.routing_s += routing.seconds
        numbers_N = self._memory.numbers_N
        self.counts.routed_documents = len(numbers_N)
        self.counts.routed_chunks = int(self._memory.chunk_offsets_N1[-1]) if len(numbers_N) else 0
        if not by_rank:
            return RoutingEvent(self.counts.rounds, ranking.chosen(routing, numbers_N))
        prior = self._request.prior
        documents = ranking.rank(routing, numbers_N, self._k, prior, self._request.arrange)
        return RoutingEvent(self.counts.rounds, documents, prior.weight if prior else 0.0)

    def _room(self, used: int) -> int:
        """Tokens of documents that still fit a row of `used` tokens and an answer."""
        left = self._model.limits.positions - used - self._answer_limit
        return max(min(self._model.template.document_tokens, left), 0)

    def _fitting(
        self, numbers: Iterable[int], room: int, enough: int = 0
    ) -> list[tuple[int, list[int]]]:
        """(number, tokens) of the documents that fit, in the order given.

        One that is too long is passed over, but for the first, which is cut instead:
        the best document is never lost to its length. None is looked at behind the one that
        makes it `enough` tokens or more (0: no such bound).
        """
        kept: list[tuple[int, list[int]]] = []
        for number in numbers:
            if enough and sum(len(ids) for _, ids in kept) >= enough:
                break
            try:
                text = self._memory.text(number)
            except KeyError:
                continue  # deleted since it was routed
            ids = self._model.prompts.cited(number, text)
            if not kept:
                ids = ids[:room]
            if ids and len(ids) <= room:
                kept.append((number, ids))
                room -= len(ids)
        self.counts.document_tokens += sum(len(ids) for _, ids in kept)
        return kept


class AnswerText:
    """A streamed answer: what follows the answer mark, or everything when there is none."""

    def __init__(self, tokenizer: Tokenizer, mark: str) -> None:
        self._all = Detokeniser(tokenizer, specials=True)
        self._plain = Detokeniser(tokenizer, specials=False)
        self._mark = mark
        self._held = ""
        self._begun = False
        #: Everything so far, control tokens by their names.
        self.seen = ""
        #: The answer proper has begun.
        self.open = not mark

    def push(self, token: int) -> str:
        """Text of the answer that the token completed."""
        self.seen += self._all.push(token)
        return self._release(self._plain.push(token))

    def flush(self) -> str:
        """The rest; without a mark, all that was held back for it."""
        text = self._release(self._plain.flush())
        return text if self.open else self._held.strip()

    def _release(self, text: str) -> str:
        if not self.open:
            self._held += text
            _, found, text = self._held.rpartition(self._mark)
            if not found:
                return ""
            self.open = True
        if not self._begun:  # an answer does not begin with the space behind its mark
            text = text.lstrip()
            self._begun = bool(text)
        return text
