"""Wire messages to dataclasses and back, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp

from memsvc.client import types
from memsvc.v1 import memory_service_pb2 as service
from memsvc.v1 import resources_pb2 as wire


def moment(stamp: Timestamp | None) -> datetime | None:
    """None stays None."""
    return stamp.ToDatetime(tzinfo=UTC) if stamp is not None else None


def timestamp(moment: datetime | None) -> Timestamp | None:
    """A naive datetime is taken as local time, as datetime itself does."""
    if moment is None:
        return None
    stamp = Timestamp()
    stamp.FromDatetime(moment.astimezone(UTC))
    return stamp


def turn_to_wire(turn: types.Turn) -> wire.Turn:
    """Raises ValueError for a role that is none."""
    return wire.Turn(
        role=wire.Role.Value(types.Role(turn.role).name),
        text=turn.text,
        occurred_at=timestamp(turn.occurred_at),
        speaker=turn.speaker,
        session=turn.session,
        metadata=turn.metadata,
    )


def turn(message: wire.Turn) -> types.Turn:
    """A turn that the server returned."""
    return types.Turn(
        role=types.Role(wire.Role.Name(message.role).lower()),
        text=message.text,
        occurred_at=moment(message.occurred_at if message.HasField("occurred_at") else None),
        speaker=message.speaker,
        session=message.session,
        metadata=dict(message.metadata),
    )


def text_start(source: types.TextSource) -> service.PutDocumentsRequest.DocumentStart:
    """What goes before a text's pieces."""
    return service.PutDocumentsRequest.DocumentStart(
        title=source.title, occurred_at=timestamp(source.occurred_at), metadata=source.metadata
    )


def _source(message: wire.Document) -> types.Conversation | types.TextSource | None:
    match message.WhichOneof("source"):
        case "conversation":
            return types.Conversation(tuple(turn(t) for t in message.conversation.turns))
        case "text":
            text = message.text
            return types.TextSource(
                text=text.text,
                title=text.title,
                occurred_at=moment(text.occurred_at if text.HasField("occurred_at") else None),
                metadata=dict(text.metadata),
            )
    return None


def document(message: wire.Document) -> types.Document:
    """A document; its source is None in the basic view."""
    return types.Document(
        name=message.name,
        number=message.number,
        revision=message.revision,
        create_time=moment(message.create_time if message.HasField("create_time") else None),
        text_bytes=message.text_bytes,
        source=_source(message),
    )


def packing_to_wire(packing: types.Packing | None) -> wire.PackingPolicy | None:
    """None stays unset: the server's default."""
    if packing is None:
        return None
    name = packing.mode.name
    mode = "MODE_UNSPECIFIED" if packing.mode is types.PackingMode.DEFAULT else name
    return wire.PackingPolicy(
        mode=wire.PackingPolicy.Mode.Value(mode),
        window_turns=packing.window_turns,
        max_document_bytes=packing.max_document_bytes,
    )


def _packing(message: wire.PackingPolicy) -> types.Packing:
    modes = {
        wire.PackingPolicy.TURN: types.PackingMode.TURN,
        wire.PackingPolicy.WINDOW: types.PackingMode.WINDOW,
        wire.PackingPolicy.SESSION: types.PackingMode.SESSION,
    }
    return types.Packing(
        mode=modes.get(message.mode, types.PackingMode.DEFAULT),
        window_turns=message.window_turns,
        max_document_bytes=message.max_document_bytes,
    )


def _memory_state(state: int) -> types.MemoryState:
    states: dict[int, types.MemoryState] = {
        wire.Memory.ACTIVE: types.MemoryState.ACTIVE,
        wire.Memory.IMPORTING: types.MemoryState.IMPORTING,
        wire.Memory.DELETING: types.MemoryState.DELETING,
    }
    return states.get(state, types.MemoryState.UNKNOWN)


def encoding(message: wire.Encoding) -> types.Encoding:
    """How far one model has read a memory."""
    states = {
        wire.Encoding.ENCODING: types.EncodingState.ENCODING,
        wire.Encoding.READY: types.EncodingState.READY,
        wire.Encoding.FAILED: types.EncodingState.FAILED,
    }
    return types.Encoding(
        model=message.model,
        state=states.get(message.state, types.EncodingState.UNKNOWN),
        encoded_revision=message.encoded_revision,
        encoded_documents=message.encoded_documents,
        pending_documents=message.pending_documents,
        tokens=message.tokens,
        bytes=message.bytes,
        quarantined_documents=message.quarantined_documents,
        failure=message.failure,
        complete=message.complete,
    )


def memory(message: wire.Memory) -> types.Memory:
    """A memory resource."""
    return types.Memory(
        name=message.name,
        uid=message.uid,
        display_name=message.display_name,
        labels=dict(message.labels),
        packing=_packing(message.packing),
        state=_memory_state(message.state),
        revision=message.revision,
        document_count=message.document_count,
        text_bytes=message.text_bytes,
        encodings=tuple(encoding(e) for e in message.encodings),
        create_time=moment(message.create_time if message.HasField("create_time") else None),
        update_time=moment(message.update_time if message.HasField("update_time") else None),
        etag=message.etag,
        default_model=message.default_model,
        next_model=message.next_model,
        forked_from_uid=message.forked_from_uid,
        forked_revision=message.forked_revision,
    )


def progress(message: service.WatchMemoryResponse) -> types.Progress:
    """One message of a watch."""
    return types.Progress(
        revision=message.revision,
        state=_memory_state(message.state),
        encodings=tuple(encoding(e) for e in message.encodings),
        default_model=message.default_model,
        next_model=message.next_model,
    )


def revision(message: service.Revision) -> types.Revision:
    """What one write made."""
    made = moment(message.create_time if message.HasField("create_time") else None)
    return types.Revision(
        message.revision, made, message.documents_added, message.documents_removed
    )


def as_of(
    request: (
        service.QueryRequest
        | service.RetrieveRequest
        | service.ListDocumentsRequest
        | service.ForkMemoryRequest
    ),
    moment: int | datetime | None,
) -> None:
    """Asks for the past: a revision, or a time; None for now."""
    if isinstance(moment, datetime):
        request.at_time.FromDatetime(moment.astimezone(UTC))
    elif moment is not None:
        request.at_revision = moment


def ranked(message: service.RankedDocument) -> types.RankedDocument:
    """A document that routing chose."""
    return types.RankedDocument(
        document=message.document,
        number=message.number,
        score=message.score,
        layers=tuple(
            types.LayerScore(layer.layer, layer.rank, layer.score) for layer in message.layers
        ),
        content=document(message.content) if message.HasField("content") else None,
        routing_score=message.routing_score,
        lexical_score=message.lexical_score,
    )


def generation_to_wire(options: types.Generation | None) -> service.GenerationOptions | None:
    """None stays unset: every value is the server's own."""
    if options is None:
        return None
    return service.GenerationOptions(
        max_answer_tokens=options.max_answer_tokens,
        top_k=options.top_k,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        max_rounds=options.max_rounds,
        lexical_weight=options.lexical_weight,
        prefer_latest=options.prefer_latest,
    )


def filter_to_wire(only: types.Filter | None) -> wire.DocumentFilter | None:
    """None stays unset: all documents. Raises ValueError for a role that is none."""
    if only is None:
        return None
    return wire.DocumentFilter(
        occurred_from=timestamp(only.occurred_from),
        occurred_before=timestamp(only.occurred_before),
        roles=[wire.Role.Value(types.Role(role).name) for role in _listed(only.roles)],
        speakers=_listed(only.speakers),
        metadata=[
            wire.DocumentFilter.Metadata(key=key, values=_listed(values))
            for key, values in only.metadata.items()
        ],
    )


def _listed(values: Iterable[str]) -> list[str]:
    """A single string is one value, not its letters."""
    return [values] if isinstance(values, str) else list(values)


def _citation(message: service.Citation) -> types.Citation:
    return types.Citation(
        document=message.document,
        number=message.number,
        round=message.round,
        content=document(message.content) if message.HasField("content") else None,
    )


def _usage(message: service.Usage) -> types.Usage:
    return types.Usage(
        question_tokens=message.question_tokens,
        answer_tokens=message.answer_tokens,
        document_tokens=message.document_tokens,
        routed_documents=message.routed_documents,
        routed_chunks=message.routed_chunks,
        rounds=message.rounds,
        queue_ms=message.queue_ms,
        page_in_ms=message.page_in_ms,
        routing_ms=message.routing_ms,
        time_to_first_token_ms=message.time_to_first_token_ms,
        total_ms=message.total_ms,
        lexical_ms=message.lexical_ms,
        filter_ms=message.filter_ms,
    )


def query_event(message: service.QueryResponse) -> types.QueryEvent | None:
    """None for an event that a newer server sends and this client does not know."""
    match message.WhichOneof("event"):
        case "routing":
            documents = tuple(ranked(d) for d in message.routing.documents)
            routing = message.routing
            return types.Routing(routing.round, documents, routing.lexical_weight)
        case "citation":
            return _citation(message.citation)
        case "text":
            return types.TextDelta(message.text.text)
        case "usage":
            return _usage(message.usage)
        case "done":
            reasons = {
                service.Done.STOP: types.DoneReason.STOP,
                service.Done.LENGTH: types.DoneReason.LENGTH,
                service.Done.ROUNDS: types.DoneReason.ROUNDS,
            }
            done = message.done
            reason = reasons.get(done.reason, types.DoneReason.UNKNOWN)
            return types.Done(reason, done.revision, done.model)
    return None
