"""Interleaved generative retrieval: the model names documents, their text is put in.

A round is a prefill with fresh routing, then decoding until the model says what next:

  RETRIEVE --reference end--> documents named, rounds left: their text joins the row,
                              which is prefilled again: RETRIEVE, next round
           --reference end--> no rounds left: the question is put in again: ANSWER
           --retrieval end--> the question is put in again: ANSWER
           --end of text----> done
  ANSWER   --end of text----> done

What differs from the published loop, on purpose: rounds are bounded; every row goes its
own pace; the question that is put in again is causal; only this round's own tokens are
searched for document numbers, and a document's text is put in once. A model that writes
more than 1,000 characters without any marker, where the published loop fails, just goes
on to its end or the token limit.
"""

from __future__ import annotations

import re

import numpy as np
import torch

from model_adapter.engine import (
    CitationEvent,
    Event,
    FinishReason,
    Generate,
    MemoryView,
    TextEvent,
)
from model_adapter.msa.forward import Attend, RoutingRequest, RowRouting, Segment
from model_adapter.msa.generate import NOTHING_TOLD, AnswerText, Model, Session, Told
from model_adapter.msa.prompt import Part, join

_NAMED = re.compile(r"\[([0-9]{1,18})\]")


class InterleaveSession(Session):
    """Answering.INTERLEAVE."""

    def __init__(self, model: Model, request: Generate, memory: MemoryView) -> None:
        super().__init__(model, request, memory)
        self._rounds = min(request.max_rounds or model.limits.rounds, model.limits.rounds)
        self._row = model.question_row(self._k)
        self._told: list[Part] = []
        self._cited: set[int] = set()
        self._written: list[int] = []
        self._queued: list[int] = []
        self._answering = self._exhausted = self._asking = False
        prompt = join(model.prompts.question(request.question))
        self._pending = prompt.ids
        self._routing: RoutingRequest | None = RoutingRequest(memory, prompt.votes, self._k)
        self._text = AnswerText(model.tokenizer, model.template.answer_mark)

    def segment(self) -> Segment:
        """A round's whole row with routing, or what continues it."""
        if self._asking and not self._queued:
            return Segment(self._row, self._pending, attend=self._model.injection)
        return Segment(self._row, self._pending, self._routing)

    def accept(
        self, logits_V: torch.Tensor | None, routing: RowRouting | None, told: Told = NOTHING_TOLD
    ) -> list[Event]:
        """Takes one token and decides what follows it."""
        assert logits_V is not None
        events: list[Event] = []
        if routing is not None:
            events.append(self._take_routing(routing, by_rank=False))
            self._routing = None
        if self._queued:  # what was written last is in the cache now; its logits are dropped
            self._pending, self._queued = self._queued, []
            return events
        self._asking = False
        token = self._sampler.pick(logits_V, told.best)
        if token in self._model.eos_ids:
            return [*events, *self._end(FinishReason.STOP)]
        self.counts.answer_tokens += 1
        self._written.append(token)
        text = self._text.push(token)
        if text:
            events.append(TextEvent(text))
        if self._ends_round():
            if self._text.open:
                return [*events, *self._end(FinishReason.STOP)]
            return [*events, *self._fetch()]
        self._pending = [token]
        if self._ends_retrieval():
            self._ask_again()
        return [*events, *self._end_if_full()]

    def _ends_round(self) -> bool:
        end = self._model.template.reference_end
        return not self._answering and tuple(self._written[-len(end) :]) == end

    def _ends_retrieval(self) -> bool:
        return not self._answering and self._model.template.retrieval_end in self._text.seen

    def _end(self, reason: FinishReason) -> list[Event]:
        if self._exhausted and reason is FinishReason.STOP:
            reason = FinishReason.ROUNDS
        return self._finish(reason, self._text.flush())

    def _end_if_full(self) -> list[Event]:
        after = self._row.position + len(self._pending) + len(self._queued)
        if self.counts.answer_tokens >= self._answer_limit or after > self._model.limits.positions:
            return self._end(FinishReason.LENGTH)
        return []

    def _fetch(self) -> list[Event]:
        """Puts in the text of the documents that this round named."""
        if self.counts.rounds >= self._rounds:
            self._exhausted = True
            self._pending = [self._written[-1]]
            self._ask_again()
            return self._end_if_full()
        prompts, question = self._model.prompts, self._request.question
        marker = self._model.template.reference_end
        opening = prompts.question_of_later_round(question)
        self._told.append(Part(self._written))
        used = len(join([*opening, *self._told]).ids) + len(marker)
        position = len(self._model.template.head) + self._k
        kept = self._fitting(self._named(), self._room(position + used))
        fetched = [token for _, ids in kept for token in ids]
        # Only what was fetched last votes, beside the question.
        prompt = join([*opening, *self._told, Part(fetched, votes=True), Part(marker)])
        self._told += [Part(fetched), Part(marker)]
        self._cited.update(number for number, _ in kept)
        self._row = self._model.question_row(self._k)
        self._pending = prompt.ids
        self._routing = RoutingRequest(self._memory, prompt.votes, self._k)
        self._written = []
        self._text = AnswerText(self._model.tokenizer, self._model.template.answer_mark)
        round_fetched = self.counts.rounds
        citations: list[Event] = [CitationEvent(number, round_fetched) for number, _ in kept]
        return [*citations, *self._end_if_full()]

    def _named(self) -> list[int]:
        """Numbers that this round wrote and the memory has, ascending, each new."""
        named = {int(digits) for digits in _NAMED.findall(self._text.seen)} - self._cited
        known = np.isin(sorted(named), self._memory.numbers_N)
        return [number for number, there in zip(sorted(named), known, strict=True) if there]

    def _ask_again(self) -> None:
        """Continues the row with the question; what was written so far is no answer."""
        self._answering = self._asking = True
        again = self._model.prompts.question_again(self._request.question)
        if self._model.injection is Attend.CAUSAL:
            self._pending = [*self._pending, *again]
        else:
            self._queued = again
        self._text = AnswerText(self._model.tokenizer, self._model.template.answer_mark)
