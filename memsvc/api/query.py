"""Query and Retrieve."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing

from memsvc import names, validation
from memsvc.api.asking import (
    Asked,
    Context,
    Snapshot,
    answered,
    ask,
    documents,
    ranked_to_wire,
    streamed,
)
from memsvc.api.documents import checked_view
from memsvc.application import Application
from memsvc.filters import worker_filter
from memsvc.v1 import memory_service_pb2 as pb
from memsvc.v1 import resources_pb2
from model_adapter.v1 import model_adapter_pb2 as worker_pb
from storage.catalog import CatalogError

log = logging.getLogger(__name__)

_DEFAULT_ANSWER_TOKENS = 128
_DEFAULT_LIMIT, _MAX_LIMIT = 10, 100
_MAX_TOP_K = 64
_MAX_TEMPERATURE = 2.0
_MAX_ROUNDS = 16
#: Finished's fields that Usage takes over as they are.
_USAGE_FIELDS = (
    "question_tokens",
    "answer_tokens",
    "document_tokens",
    "routed_documents",
    "routed_chunks",
    "rounds",
    "queue_ms",
    "page_in_ms",
    "routing_ms",
    "lexical_ms",
    "filter_ms",
    "time_to_first_token_ms",
    "total_ms",
)


class QueryHandler:
    """Questions to memories."""

    def __init__(self, application: Application) -> None:
        self._app = application

    async def query(
        self, request: pb.QueryRequest, context: Context
    ) -> AsyncGenerator[pb.QueryResponse]:
        """Streams one answer. Closing the generator stops the worker at its next step."""
        _check_options(request.options)
        asked = await ask(self._app, request, context)

        def call(snapshot: Snapshot) -> AsyncGenerator[worker_pb.QueryResponse]:
            wanted = _worker_request(asked, snapshot, request)
            return snapshot.served.client.query(wanted, asked.deadline.left_s)

        finished: worker_pb.Finished | None = None
        try:
            async with aclosing(streamed(self._app, asked, call)) as events:
                async for snapshot, event in events:
                    if event.WhichOneof("event") == "finished":
                        finished = event.finished
                        yield pb.QueryResponse(usage=_usage(finished))
                        yield pb.QueryResponse(done=_done(finished, asked, snapshot))
                        return
                    reply = await self._event(asked, event)
                    if reply is not None:
                        yield reply
        finally:
            # Also for an answer that its reader left: the question was worked on.
            await self._account(asked, finished)

    async def retrieve(self, request: pb.RetrieveRequest, context: Context) -> pb.RetrieveResponse:
        """Ranks documents; a document deleted meanwhile is left out."""
        view = checked_view(request.view, resources_pb2.FULL)
        limit = int(
            validation.check_range(
                "limit", request.limit, low=1, high=_MAX_LIMIT, default=_DEFAULT_LIMIT
            )
        )
        validation.check_range("lexical_weight", request.lexical_weight, low=0, high=1)
        asked = await ask(self._app, request, context)

        async def call(snapshot: Snapshot) -> worker_pb.RouteResponse:
            return await snapshot.served.client.route(
                worker_pb.RouteRequest(
                    memory=snapshot.reference,
                    question=request.question,
                    limit=limit,
                    lexical_weight=_weight(request),
                    filter=worker_filter(asked.wanted),
                    prefer_latest=request.prefer_latest,
                ),
                asked.deadline.left_s,
            )

        snapshot, routed = await answered(self._app, asked, call)
        numbers = [ranked.number for ranked in routed.documents]
        found = await documents(self._app, asked.memory, numbers, view)
        response = pb.RetrieveResponse(
            revision=asked.revision,
            model=names.model_name(snapshot.model.model_id),
            lexical_weight=routed.lexical_weight,
        )
        for ranked in routed.documents:
            if ranked.number in found:
                wire = ranked_to_wire(asked.memory, ranked)
                wire.content.CopyFrom(found[ranked.number])
                response.documents.append(wire)
        return response

    async def _event(self, asked: Asked, event: worker_pb.QueryResponse) -> pb.QueryResponse | None:
        """None for a citation whose document was deleted meanwhile."""
        match event.WhichOneof("event"):
            case "text":
                return pb.QueryResponse(text=pb.TextDelta(text=event.text.text))
            case "routing":
                routing = pb.Routing(
                    round=event.routing.round,
                    documents=[ranked_to_wire(asked.memory, d) for d in event.routing.documents],
                    lexical_weight=event.routing.lexical_weight,
                )
                return pb.QueryResponse(routing=routing)
            case "citation":
                number = event.citation.number
                found = await documents(self._app, asked.memory, [number], resources_pb2.FULL)
                if number not in found:
                    return None
                citation = pb.Citation(
                    document=names.document_name(asked.memory.memory_id, number),
                    number=number,
                    round=event.citation.round,
                    content=found[number],
                )
                return pb.QueryResponse(citation=citation)
            case _:
                return None

    async def _account(self, asked: Asked, finished: worker_pb.Finished | None) -> None:
        tenant, read, written = asked.memory.tenant_uid, 0, 0
        if finished is not None:
            read, written = finished.question_tokens, finished.answer_tokens
            self._app.limiter.spend_tokens(tenant, read + finished.document_tokens + written)
        try:
            await self._app.catalog.add_usage(
                tenant, queries=1, question_tokens=read, answer_tokens=written
            )
        except CatalogError as error:
            log.warning("a query was not counted: %s", type(error).__name__)


def _check_options(options: pb.GenerationOptions) -> None:
    """Limits of GenerationOptions; 0 always means a default."""
    for name, value, low, high in (
        ("max_answer_tokens", options.max_answer_tokens, 1, 2**31 - 1),
        ("top_k", options.top_k, 1, _MAX_TOP_K),
        ("temperature", options.temperature, 0, _MAX_TEMPERATURE),
        ("top_p", options.top_p, 0, 1),
        ("max_rounds", options.max_rounds, 1, _MAX_ROUNDS),
    ):
        validation.check_range(f"options.{name}", value, low=low, high=high, default=0)
    validation.check_range("options.lexical_weight", options.lexical_weight, low=0, high=1)


def _weight(message: pb.RetrieveRequest | pb.GenerationOptions) -> float | None:
    """None when it is left to the model."""
    return message.lexical_weight if message.HasField("lexical_weight") else None


def _worker_request(
    asked: Asked, snapshot: Snapshot, request: pb.QueryRequest
) -> worker_pb.QueryRequest:
    options, most = request.options, snapshot.model.max_answer_tokens
    tokens = validation.check_range(
        "options.max_answer_tokens",
        options.max_answer_tokens,
        low=1,
        high=most,
        default=min(_DEFAULT_ANSWER_TOKENS, most),
    )
    return worker_pb.QueryRequest(
        memory=snapshot.reference,
        question=request.question,
        max_answer_tokens=int(tokens),
        top_k=options.top_k,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        max_rounds=options.max_rounds,
        lexical_weight=_weight(options),
        filter=worker_filter(asked.wanted),
        prefer_latest=options.prefer_latest,
    )


def _usage(finished: worker_pb.Finished) -> pb.Usage:
    return pb.Usage(**{name: getattr(finished, name) for name in _USAGE_FIELDS})


_REASONS = {
    worker_pb.Finished.STOP: pb.Done.STOP,
    worker_pb.Finished.LENGTH: pb.Done.LENGTH,
    worker_pb.Finished.ROUNDS: pb.Done.ROUNDS,
}


def _done(finished: worker_pb.Finished, asked: Asked, snapshot: Snapshot) -> pb.Done:
    return pb.Done(
        reason=_REASONS[finished.reason],
        revision=asked.revision,
        model=names.model_name(snapshot.model.model_id),
    )
