"""Between the wire and storage. Requests are checked on the way in."""

from __future__ import annotations

import calendar
from collections.abc import Iterable, Sequence
from datetime import datetime

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from memsvc import errors, names, packing, validation
from memsvc.etags import memory_etag
from memsvc.v1 import admin_service_pb2 as admin
from memsvc.v1 import memory_service_pb2 as service
from memsvc.v1 import resources_pb2 as pb
from storage.catalog import (
    ApiKeyRow,
    DocumentRow,
    EncodingRow,
    EncodingState,
    MemoryRow,
    MemoryState,
    ModelRow,
    Packing,
    PackingMode,
    RevisionRow,
    Scope,
    TenantRow,
    UsageRow,
)
from storage.documents import Conversation, Role, Source, TextSource, Turn

ROLES = {
    pb.USER: Role.USER,
    pb.ASSISTANT: Role.ASSISTANT,
    pb.SYSTEM: Role.SYSTEM,
    pb.TOOL: Role.TOOL,
}
_WIRE_ROLES = {role: number for number, role in ROLES.items()}
_MODES = {
    pb.PackingPolicy.TURN: PackingMode.TURN,
    pb.PackingPolicy.WINDOW: PackingMode.WINDOW,
    pb.PackingPolicy.SESSION: PackingMode.SESSION,
}
_WIRE_MODES = {mode: number for number, mode in _MODES.items()}
_SCOPES = {
    admin.READ: Scope.READ,
    admin.READ_WRITE: Scope.READ_WRITE,
    admin.ADMIN: Scope.ADMIN,
}
_WIRE_SCOPES = {scope: number for number, scope in _SCOPES.items()}
_STATES = {
    MemoryState.ACTIVE: pb.Memory.ACTIVE,
    MemoryState.IMPORTING: pb.Memory.IMPORTING,
    MemoryState.DELETING: pb.Memory.DELETING,
}
_ENCODING_STATES = {
    EncodingState.ENCODING: pb.Encoding.ENCODING,
    EncodingState.READY: pb.Encoding.READY,
    EncodingState.FAILED: pb.Encoding.FAILED,
}


# --- from the wire ------------------------------------------------------------------


def turns_from_wire(turns: Sequence[pb.Turn]) -> list[Turn]:
    """Checks every limit of Turn; errors name turns[i] and the field in it."""
    validation.check_count("turns", len(turns), low=1, high=validation.MAX_TURNS)
    return [_turn(f"turns[{index}]", turn) for index, turn in enumerate(turns)]


def _turn(path: str, turn: pb.Turn) -> Turn:
    validation.check_role(f"{path}.role", turn.role)
    validation.check_text(f"{path}.text", turn.text, validation.MAX_TURN_TEXT)
    return Turn(
        role=ROLES[turn.role],
        text=turn.text,
        occurred_at=optional_time(f"{path}.occurred_at", turn),
        speaker=validation.check_string(f"{path}.speaker", turn.speaker, validation.MAX_SPEAKER),
        session=validation.check_string(f"{path}.session", turn.session, validation.MAX_SESSION),
        metadata=validation.check_metadata(f"{path}.metadata", turn.metadata),
    )


def optional_time(
    field: str, message: pb.Turn | service.PutDocumentsRequest.DocumentStart
) -> datetime | None:
    """occurred_at of a message that has one."""
    if not message.HasField("occurred_at"):
        return None
    return validation.check_time(field, message.occurred_at)


def packing_from_wire(field: str, wire: pb.PackingPolicy, default: PackingMode) -> Packing:
    """A policy with every default put in."""
    if wire.mode not in pb.PackingPolicy.Mode.values():
        raise errors.field_invalid(f"{field}.mode", "is not a packing mode")
    mode = _MODES.get(wire.mode, default)
    for name, value, (low, high), modes in (
        ("window_turns", wire.window_turns, packing.WINDOW_TURNS, (PackingMode.WINDOW,)),
        (
            "max_document_bytes",
            wire.max_document_bytes,
            packing.DOCUMENT_BYTES,
            (PackingMode.WINDOW, PackingMode.SESSION),
        ),
    ):
        if value and mode not in modes:
            raise errors.field_invalid(f"{field}.{name}", f"has no meaning in mode {mode.name}")
        if value:
            validation.check_range(f"{field}.{name}", value, low=low, high=high)
    return packing.policy(mode, wire.window_turns, wire.max_document_bytes)


def scope_from_wire(field: str, scope: int) -> Scope:
    """Refuses the zero value and unknown numbers."""
    if scope == admin.SCOPE_UNSPECIFIED:
        raise errors.field_required(field)
    for number, known in _SCOPES.items():
        if number == scope:
            return known
    raise errors.field_invalid(field, "is not a scope")


# --- to the wire --------------------------------------------------------------------


def time_to_wire(moment_us: int) -> Timestamp:
    """From UTC microseconds."""
    seconds, micros = divmod(moment_us, 1_000_000)
    return Timestamp(seconds=seconds, nanos=micros * 1000)


def _datetime_to_wire(moment: datetime | None) -> Timestamp | None:
    if moment is None:
        return None
    seconds = calendar.timegm(moment.utctimetuple())
    return Timestamp(seconds=seconds, nanos=moment.microsecond * 1000)


def memory_to_wire(row: MemoryRow, encodings: Iterable[EncodingRow] = ()) -> pb.Memory:
    """A memory with its encodings."""
    return pb.Memory(
        name=names.memory_name(row.memory_id),
        uid=row.uid,
        display_name=row.display_name,
        labels=row.labels,
        packing=pb.PackingPolicy(
            mode=_WIRE_MODES[row.packing.mode],
            window_turns=row.packing.window_turns,
            max_document_bytes=row.packing.max_document_bytes,
        ),
        state=_STATES[row.state],
        revision=row.revision,
        document_count=row.document_count,
        text_bytes=row.text_bytes,
        encodings=[encoding_to_wire(encoding) for encoding in encodings],
        create_time=time_to_wire(row.created_us),
        update_time=time_to_wire(row.updated_us),
        etag=memory_etag(row),
        retention=Duration(seconds=row.retention_s) if row.retention_s else None,
        default_model=optional_model_name(row.default_model_id),
        next_model=optional_model_name(row.next_model_id),
        forked_from_uid=row.forked_from,
        forked_revision=row.forked_revision,
    )


def encoding_to_wire(row: EncodingRow) -> pb.Encoding:
    """How far a memory is encoded under one model."""
    return pb.Encoding(
        model=names.model_name(row.model_id),
        state=_ENCODING_STATES[row.state],
        encoded_revision=row.encoded_revision,
        encoded_documents=row.encoded_documents,
        pending_documents=row.pending_documents,
        tokens=row.tokens,
        bytes=row.bytes,
        quarantined_documents=row.quarantined_documents,
        failure=row.failure,
        complete=row.complete,
    )


def optional_model_name(model_id: str) -> str:
    """Empty for no model."""
    return names.model_name(model_id) if model_id else ""


def revision_to_wire(row: RevisionRow) -> service.Revision:
    """What one write made."""
    return service.Revision(
        revision=row.revision,
        create_time=time_to_wire(row.created_us),
        documents_added=row.documents_added,
        documents_removed=row.documents_removed,
    )


def document_to_wire(memory_id: str, row: DocumentRow, source: Source | None) -> pb.Document:
    """source: None leaves the content out (the BASIC view)."""
    document = pb.Document(
        name=names.document_name(memory_id, row.number),
        number=row.number,
        revision=row.revision_added,
        create_time=time_to_wire(row.created_us),
        text_bytes=row.text_bytes,
    )
    if isinstance(source, Conversation):
        document.conversation.turns.extend(_turn_to_wire(turn) for turn in source.turns)
    elif isinstance(source, TextSource):
        document.text.CopyFrom(
            pb.TextSource(
                title=source.title,
                text=source.text,
                occurred_at=_datetime_to_wire(source.occurred_at),
                metadata=source.metadata,
            )
        )
    return document


def _turn_to_wire(turn: Turn) -> pb.Turn:
    return pb.Turn(
        role=_WIRE_ROLES[turn.role],
        text=turn.text,
        occurred_at=_datetime_to_wire(turn.occurred_at),
        speaker=turn.speaker,
        session=turn.session,
        metadata=turn.metadata,
    )


def model_to_wire(row: ModelRow, *, serving: bool) -> pb.Model:
    """serving: whether a worker serves it now."""
    layout = row.layout
    return pb.Model(
        name=names.model_name(row.model_id),
        display_name=row.display_name,
        state=pb.Model.SERVING if serving else pb.Model.UNAVAILABLE,
        identity=row.identity,
        layout=pb.KVLayout(
            routed_layers=layout.routed_layers,
            kv_heads=layout.kv_heads,
            head_dim=layout.head_dim,
            pool_tokens=layout.pool_tokens,
            dtype=layout.dtype,
            separate_routing_keys=layout.separate_routing_keys,
        ),
        limits=pb.ModelLimits(
            max_document_tokens=row.max_document_tokens,
            max_question_tokens=row.max_question_tokens,
            max_answer_tokens=row.max_answer_tokens,
        ),
        default_model=row.default,
    )


def tenant_to_wire(row: TenantRow) -> admin.Tenant:
    """A tenant."""
    return admin.Tenant(
        name=names.tenant_name(row.tenant_id),
        display_name=row.display_name,
        create_time=time_to_wire(row.created_us),
        default_model=optional_model_name(row.default_model_id),
    )


def api_key_to_wire(row: ApiKeyRow) -> admin.ApiKey:
    """A key without its secret, which nobody has."""
    key = admin.ApiKey(
        name=names.api_key_name(row.tenant_id, row.key_id),
        display_name=row.display_name,
        scope=_WIRE_SCOPES[row.scope],
        create_time=time_to_wire(row.created_us),
        memories=sorted(names.memory_name(held) for held in (row.memories or {}).values()),
        operator=row.operator,
    )
    if row.expires_us is not None:
        key.expire_time.CopyFrom(time_to_wire(row.expires_us))
    if row.revoked_us is not None:
        key.revoke_time.CopyFrom(time_to_wire(row.revoked_us))
    return key


def usage_to_wire(tenant_id: str, row: UsageRow) -> admin.TenantUsage:
    """What a tenant holds and has used."""
    return admin.TenantUsage(
        name=names.tenant_name(tenant_id),
        memories=row.memories,
        documents=row.documents,
        text_bytes=row.text_bytes,
        block_bytes=row.block_bytes,
        queries=row.queries,
        question_tokens=row.question_tokens,
        answer_tokens=row.answer_tokens,
        encoded_tokens=row.encoded_tokens,
    )
