"""The MSA engine: encode, route and generate for one loaded model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from model_adapter.engine import (
    Arrange,
    DocumentText,
    DocumentTooLongError,
    Encoded,
    EncodeFailure,
    Generate,
    Generation,
    LexicalPrior,
    MemoryView,
    ModelDescription,
    QuestionTooLongError,
    RankedDocument,
    StepResult,
)
from model_adapter.msa import ranking
from model_adapter.msa.config import MAX_TOP_K, LoadedModel
from model_adapter.msa.decode_step import PooledRows, Way
from model_adapter.msa.decode_step import choose as choose_rows
from model_adapter.msa.encode import (
    TokenisedDocument,
    batches,
    encode_batch,
    packed_batches,
    packs,
)
from model_adapter.msa.forward import Attend, encode_prefix, new_row, run
from model_adapter.msa.generate import Limits, Model, Session
from model_adapter.msa.interleave import InterleaveSession
from model_adapter.msa.kernel_choice import RoutingChoice
from model_adapter.msa.model import Decoder
from model_adapter.msa.prompt import Answering, PromptBuilder
from model_adapter.msa.routed_text import RoutedTextSession, routing_segment
from model_adapter.msa.stepping import advance, prefill_tokens

#: Limits of a model with room for them; a small context lowers them.
MAX_DOCUMENT_TOKENS = 32768
MAX_QUESTION_TOKENS = 2048
MAX_ANSWER_TOKENS = 1024
MAX_ROUNDS = 8


def limits_of(model: LoadedModel) -> Limits:
    """What fits the model's context: a question and an answer take a quarter each at most."""
    positions = model.config.max_positions
    return Limits(
        document_tokens=min(MAX_DOCUMENT_TOKENS, positions),
        question_tokens=max(min(MAX_QUESTION_TOKENS, positions // 4), 1),
        answer_tokens=max(min(MAX_ANSWER_TOKENS, positions // 4), 1),
        positions=positions,
        rounds=MAX_ROUNDS,
    )


class MsaEngine:
    """model_adapter.engine.Engine over torch, on a CPU or a GPU."""

    def __init__(
        self,
        model: LoadedModel,
        device: str = "cpu",
        threads: int = 0,
        limits: Limits | None = None,
        *,
        injection: Attend = Attend.CAUSAL,
        routing: RoutingChoice | None = None,
        pooled: Way | None = None,
    ) -> None:
        """threads: of the CPU for torch, 0 for as many as it finds. injection:
        BIDIRECTIONAL reproduces the published attention of the question that is put in
        again. routing: by kernels, or by the formula (the default). pooled: how
        rows share a pool, by default by what the device allows. The weights move out of
        `model`; CheckpointError when they do not fit it.
        """
        if threads:
            torch.set_num_threads(threads)
        place = torch.device(device)
        limits = limits or limits_of(model)
        with torch.inference_mode():
            decoder = Decoder(model, place)
            decoder.kernels = routing.kernels if routing else None
            model.weights.clear()
            prefix = encode_prefix(decoder, model.template.head)
            prompts = PromptBuilder(model.tokenizer, model.template)
            chats = model.template.answering is Answering.ROUTED_TEXT
            opening = prompts.chat_opening() if chats else []
            opened = encode_prefix(decoder, opening)
            if pooled is None:
                decoder.rows, attending = choose_rows(decoder, limits.positions, place)
            else:
                decoder.rows = PooledRows(decoder, limits.positions, pooled)
                attending = f"rows attend by {pooled.value}"
            # In the pool, where there is one, rows begin with them at once.
            prefix, opened = (new_row(decoder, each).cache for each in (prefix, opened))
        self._model = Model(
            decoder=decoder,
            tokenizer=model.tokenizer,
            prompts=prompts,
            prefix=prefix,
            opening=opening,
            opened=opened,
            eos_ids=frozenset(model.eos_ids),
            limits=limits,
            injection=injection,
        )
        self._prefill_tokens = prefill_tokens(decoder)
        reasons = [routing.reason] if routing else []
        self._description = ModelDescription(
            model_id=model.model_id,
            display_name=model.display_name,
            identity=model.identity,
            layout=model.config.layout(model.compute_dtype),
            max_document_tokens=limits.document_tokens,
            max_question_tokens=limits.question_tokens,
            max_answer_tokens=limits.answer_tokens,
            device=device,
            compute_dtype=model.compute_dtype,
            lexical_weight=model.template.lexical_weight,
            storing=routing.storing if routing else None,
            placement="; ".join([f"on {device}", *reasons, attending]),
        )

    @property
    def description(self) -> ModelDescription:
        """Constant for the engine's life."""
        return self._description

    def encode(self, documents: Sequence[DocumentText]) -> Encoded:
        """Each document alone, batched by length; blocks come in no particular order."""
        result = Encoded()
        tokenised = []
        for document in documents:
            ids = self._model.prompts.document(document.number, document.text)
            if len(ids) <= self._model.limits.document_tokens:
                tokenised.append(TokenisedDocument(document.number, ids))
                continue
            error = DocumentTooLongError(
                f"document {document.number} has {len(ids)} tokens, "
                f"the model encodes {self._model.limits.document_tokens}",
                limit=str(self._model.limits.document_tokens),
                actual=str(len(ids)),
            )
            result.failures.append(EncodeFailure(document.number, error))
        with torch.inference_mode():
            decoder = self._model.decoder
            for batch in packed_batches(tokenised) if packs(decoder) else batches(tokenised):
                result.blocks.extend(encode_batch(decoder, batch))
        return result

    def route(
        self,
        question: str,
        memory: MemoryView,
        limit: int,
        prior: LexicalPrior | None = None,
        arrange: Arrange | None = None,
    ) -> list[RankedDocument]:
        """The best documents over all routed layers. Raises QuestionTooLongError."""
        self._check_question(question)
        k = self._model.decoder.config.msa.top_k
        with torch.inference_mode():
            segment = routing_segment(self._model, question, memory, k, prior)
            found = run(self._model.decoder, [segment], only_routing=True).routings[0]
        assert found is not None and found.error is None
        return list(ranking.rank(found, memory.numbers_N, limit, prior, arrange))

    def start(self, request: Generate, memory: MemoryView) -> Generation:
        """Raises QuestionTooLongError."""
        self._check_question(request.question)
        request = replace(request, top_k=min(request.top_k, MAX_TOP_K))
        if self._model.template.answering is Answering.INTERLEAVE:
            return InterleaveSession(self._model, request, memory)
        return RoutedTextSession(self._model, request, memory)

    def step(self, generations: Sequence[Generation]) -> list[StepResult]:
        """Advances each by one unit, but for those whose prompts wait; see stepping."""
        sessions = [generation for generation in generations if isinstance(generation, Session)]
        if len(sessions) != len(generations) or any(session.done for session in sessions):
            raise ValueError("a generation of another engine, or one that is done")
        with torch.inference_mode():
            made = advance(self._model.decoder, sessions, self._prefill_tokens)
        return [
            StepResult(session, tuple(made.events.get(place, ())), made.errors.get(place))
            for place, session in enumerate(sessions)
        ]

    def settle(self) -> None:
        """See Engine."""
        if (rows := self._model.decoder.rows) is not None:
            rows.pool.settle()

    def _check_question(self, question: str) -> None:
        tokens = len(self._model.prompts.text(question))
        limit = self._model.limits.question_tokens
        if tokens > limit:
            raise QuestionTooLongError(
                f"the question has {tokens} tokens, the model takes {limit}",
                limit=str(limit),
                actual=str(tokens),
            )
