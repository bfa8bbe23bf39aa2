"""Answers from the routed documents' text, in the base's own chat format.

For bases that were not trained to name documents. Step 1 routes the question over the
memory and stops there; step 2 prefills a chat turn with the best documents' text, best
first, before the question; further steps decode. The compressed KV serves routing only:
such a base has never attended to mean-pooled keys and values.
"""

from __future__ import annotations

import numpy as np
import torch

from model_adapter.engine import (
    CitationEvent,
    Event,
    FinishReason,
    Generate,
    LexicalPrior,
    MemoryView,
    TextEvent,
)
from model_adapter.msa import ranking
from model_adapter.msa.forward import RoutingRequest, Row, RowRouting, Segment
from model_adapter.msa.generate import NOTHING_TOLD, AnswerText, Model, Session, Told
from model_adapter.msa.prompt import join


class RoutedTextSession(Session):
    """Answering.ROUTED_TEXT."""

    def __init__(self, model: Model, request: Generate, memory: MemoryView) -> None:
        super().__init__(model, request, memory)
        self._answer = AnswerText(model.tokenizer, mark="")
        self._row: Row | None = None
        self._pending: list[int] = []

    @property
    def only_routes(self) -> bool:
        """True until the documents are known."""
        return self._row is None

    @property
    def wonders(self) -> int | None:
        """Before an answer: the first token of `unknown`."""
        template = self._model.template
        answers = self._row is not None and not self.counts.answer_tokens
        if not (answers and template.unknown and template.unknown_share):
            return None
        return self._model.prompts.text(template.unknown)[0]

    def segment(self) -> Segment:
        """The question to be routed, then the chat turn, then one token at a time."""
        if self._row is not None:
            return Segment(self._row, self._pending)
        asked = self._request
        return routing_segment(self._model, asked.question, self._memory, self._k, asked.prior)

    def accept(
        self, logits_V: torch.Tensor | None, routing: RowRouting | None, told: Told = NOTHING_TOLD
    ) -> list[Event]:
        """Documents after the first segment, text after the others."""
        if self._row is None:
            assert routing is not None
            return self._open_chat(routing)
        assert logits_V is not None
        token = self._unknown(logits_V, told)
        if token is None:
            token = self._sampler.pick(logits_V, told.best)
        if token in self._model.eos_ids:
            return self._finish(FinishReason.STOP, self._answer.flush())
        self.counts.answer_tokens += 1
        text = self._answer.push(token)
        if (
            self.counts.answer_tokens >= self._answer_limit
            or self._row.position >= self._model.limits.positions
        ):
            return self._finish(FinishReason.LENGTH, text + self._answer.flush())
        self._pending = [token]
        return [TextEvent(text)] if text else []

    def _unknown(self, logits_V: torch.Tensor, told: Told) -> int | None:
        """The first token of `unknown`, for an answer's first one when it is likely enough."""
        start = self.wonders
        if start is None:
            return None
        share = float(logits_V.softmax(-1)[start]) if told.share is None else told.share
        return start if share >= self._model.template.unknown_share else None

    def _open_chat(self, routing: RowRouting) -> list[Event]:
        chosen = self._take_routing(routing, by_rank=True)
        prompts, template = self._model.prompts, self._model.template
        asked_for = self._request.top_k
        bare = prompts.chat([[]], self._request.question)
        count = asked_for or template.documents or self._k
        enough = 0 if asked_for else template.enough_tokens
        best_first = (document.number for document in chosen.documents[:count])
        kept = self._fitting(best_first, self._room(len(bare)), enough)
        if not kept and template.unknown:
            return [chosen, *self._finish(FinishReason.STOP, template.unknown)]
        turn = prompts.chat([ids for _, ids in kept], self._request.question)
        self._row, self._pending = self._model.chat_row(turn)
        citations = [CitationEvent(number, chosen.round) for number, _ in kept]
        return [chosen, *citations]


def routing_segment(
    model: Model, question: str, memory: MemoryView, k: int, prior: LexicalPrior | None = None
) -> Segment:
    """A question's first-round row, to be routed over a memory. prior: of the ranking to come."""
    prompt = join(model.prompts.question(question))
    if prior is None:
        routing = RoutingRequest(memory, prompt.votes, k)
    else:
        named = np.fromiter(ranking.by_position(prior, memory.numbers_N), np.int64)
        routing = RoutingRequest(memory, prompt.votes, k, others=named)
    return Segment(model.question_row(k), prompt.ids, routing)
