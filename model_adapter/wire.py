"""Between the wire's messages and the engine's types; checks requests on the way in.

Limits of the link to memsvc are here: a request holds at most MAX_DOCUMENTS
documents, and a message either way at most MAX_MESSAGE_BYTES. A block travels
in one message, so that also bounds how long a document the worker encodes.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from model_adapter.engine import (
    CitationEvent,
    Counts,
    DocumentText,
    DocumentTooLongError,
    EncodeFailure,
    FinishReason,
    Generate,
    LayerScore,
    LexicalPrior,
    ModelDescription,
    ModelMismatchError,
    RankedDocument,
    RoutingEvent,
    TextEvent,
)
from model_adapter.errors import FieldError, TooManyItemsError
from model_adapter.residency import MemoryKey
from model_adapter.v1 import model_adapter_pb2 as pb
from storage.crypto import MemorySecret
from storage.crypto.key_tree import SECRET_BYTES
from storage.layout import KVBlock, KVLayout

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
MAX_DOCUMENTS = 256
MAX_ROUTE_LIMIT = 100
#: Of a message that carries a block, what is not arrays.
_FRAME_BYTES = 4 * 1024

_MAX_GENERATION = 2**32

_UID = re.compile(r"[0-9a-f]{32}")

REASONS = {
    FinishReason.STOP: pb.Finished.STOP,
    FinishReason.LENGTH: pb.Finished.LENGTH,
    FinishReason.ROUNDS: pb.Finished.ROUNDS,
}


def longest_document(layout: KVLayout, max_message_bytes: int = MAX_MESSAGE_BYTES) -> int:
    """Tokens of the longest document whose block fits a message."""
    chunks = (max_message_bytes - _FRAME_BYTES) // layout.block_bytes(1)
    return chunks * layout.pool_tokens


def within_link(description: ModelDescription) -> ModelDescription:
    """The description with max_document_tokens no larger than the link carries."""
    longest = min(description.max_document_tokens, longest_document(description.layout))
    return dataclasses.replace(description, max_document_tokens=longest)


def check_identity(asked: str, own: str) -> None:
    """Raises ModelMismatchError."""
    if asked != own:
        raise ModelMismatchError("the worker holds another model", identity=own)


def memory_key(tenant: str, memory_uid: str, field: str) -> MemoryKey:
    """Raises FieldError unless both are 32 lower-case hex digits."""
    for name, uid in (("tenant", tenant), ("memory_uid", memory_uid)):
        if not _UID.fullmatch(uid):
            raise FieldError(f"{field}{name} is not 32 hex digits", field=f"{field}{name}")
    return MemoryKey(tenant, memory_uid)


def memory_secret(ref: pb.MemoryRef) -> MemorySecret | None:
    """None for a memory that is not encrypted. Raises FieldError."""
    if not ref.memory_key:
        return None
    if len(ref.memory_key) != SECRET_BYTES:
        raise FieldError("a memory key has 32 bytes", field="memory.memory_key")
    if not 0 <= ref.key_generation < _MAX_GENERATION:
        raise FieldError("no key generation", field="memory.key_generation")
    return MemorySecret(ref.memory_key, ref.key_generation)


def evict_target(request: pb.EvictRequest) -> tuple[str, str]:
    """Tenant and memory; an empty memory is all of the tenant, two empty names are everything.
    Raises FieldError.
    """
    if not request.tenant and not request.memory_uid:
        return "", ""
    if not request.memory_uid:
        memory_key(request.tenant, "0" * 32, "")
        return request.tenant, ""
    key = memory_key(request.tenant, request.memory_uid, "")
    return key.tenant, key.memory


def documents(request: pb.EncodeRequest) -> list[DocumentText]:
    """Raises FieldError, TooManyItemsError."""
    count = len(request.documents)
    if not count:
        raise FieldError("no documents", field="documents")
    if count > MAX_DOCUMENTS:
        raise TooManyItemsError(
            "too many documents", field="documents", limit=str(MAX_DOCUMENTS), actual=str(count)
        )
    numbers = [document.number for document in request.documents]
    if min(numbers) < 1 or len(set(numbers)) < count:
        raise FieldError("document numbers are positive and unique", field="documents.number")
    return [DocumentText(document.number, document.text) for document in request.documents]


def generate(request: pb.QueryRequest) -> Generate:
    """Raises FieldError."""
    _question(request.question)
    for name in ("max_answer_tokens", "top_k", "max_rounds", "temperature", "top_p"):
        # Written so that NaN is refused too.
        if not getattr(request, name) >= 0:
            raise FieldError(f"{name} is negative", field=name)
    if request.top_p > 1:
        raise FieldError("top_p is above 1", field="top_p")
    return Generate(
        question=request.question,
        max_answer_tokens=request.max_answer_tokens,
        top_k=request.top_k,
        temperature=request.temperature,
        top_p=request.top_p or 1.0,
        seed=request.seed,
        max_rounds=request.max_rounds,
    )


def route_question(request: pb.RouteRequest) -> tuple[str, int]:
    """Question and limit. Raises FieldError."""
    _question(request.question)
    if not 1 <= request.limit <= MAX_ROUTE_LIMIT:
        raise FieldError(f"limit is not 1 to {MAX_ROUTE_LIMIT}", field="limit")
    return request.question, request.limit


def lexical_weight(request: pb.QueryRequest | pb.RouteRequest, own: float) -> float:
    """As asked, or the model's own. Raises FieldError."""
    if not request.HasField("lexical_weight"):
        return own
    # Written so that NaN is refused too.
    if not 0 <= request.lexical_weight <= 1:
        raise FieldError("lexical_weight is not 0 to 1", field="lexical_weight")
    return request.lexical_weight


def weight(prior: LexicalPrior | None) -> float:
    """Share that the words had; 0 when routing ranked alone."""
    return prior.weight if prior else 0.0


def _question(question: str) -> None:
    if not question.strip():
        raise FieldError("no question", field="question")


def layout_message(layout: KVLayout) -> pb.KVLayout:
    """As memsvc.v1.KVLayout."""
    return pb.KVLayout(
        routed_layers=layout.routed_layers,
        kv_heads=layout.kv_heads,
        head_dim=layout.head_dim,
        pool_tokens=layout.pool_tokens,
        dtype=layout.dtype,
        separate_routing_keys=layout.separate_routing_keys,
    )


def encode_response(item: KVBlock | EncodeFailure, layout: KVLayout) -> pb.EncodeResponse:
    """A block, or why there is none; a block too large for the link counts as too long."""
    if isinstance(item, KVBlock):
        limit = longest_document(layout)
        if item.tokens <= limit:
            return pb.EncodeResponse(number=item.number, block=_block(item))
        error = DocumentTooLongError("too long", limit=str(limit), actual=str(item.tokens))
        item = EncodeFailure(item.number, error)
    failure = pb.DocumentFailure(reason=item.error.reason, metadata=item.error.metadata)
    return pb.EncodeResponse(number=item.number, failure=failure)


def _block(block: KVBlock) -> pb.Block:
    return pb.Block(
        tokens=block.tokens,
        chunks=block.routing_key_LCE.shape[1],
        routing_key=block.routing_key_LCE.tobytes(),
        key=b"" if block.key_LCE is None else block.key_LCE.tobytes(),
        value=block.value_LCE.tobytes(),
    )


def ranked(documents: Sequence[RankedDocument]) -> list[pb.RankedDocument]:
    """In the order given."""
    return [
        pb.RankedDocument(
            number=document.number,
            score=document.score,
            layers=[_layer(layer) for layer in document.layers],
            routing_score=document.routing_score,
            lexical_score=document.lexical_score,
        )
        for document in documents
    ]


def _layer(layer: LayerScore) -> pb.LayerScore:
    return pb.LayerScore(layer=layer.layer, rank=layer.rank, score=layer.score)


def event(event: RoutingEvent | CitationEvent | TextEvent) -> pb.QueryResponse:
    """Any event but the last, which carries times as well."""
    match event:
        case RoutingEvent(round, found, share):
            routing = pb.Routing(round=round, documents=ranked(found), lexical_weight=share)
            return pb.QueryResponse(routing=routing)
        case CitationEvent(number, round):
            return pb.QueryResponse(citation=pb.Citation(number=number, round=round))
        case TextEvent(text):
            return pb.QueryResponse(text=pb.TextDelta(text=text))


@dataclasses.dataclass
class Times:
    """Of one query, seconds."""

    queue: float = 0.0
    page_in: float = 0.0
    lexical: float = 0.0
    filter: float = 0.0
    first_token: float = 0.0
    total: float = 0.0


def finished(reason: FinishReason, counts: Counts, times: Times) -> pb.QueryResponse:
    """The last message of an answer."""
    return pb.QueryResponse(
        finished=pb.Finished(
            reason=REASONS[reason],
            question_tokens=counts.question_tokens,
            answer_tokens=counts.answer_tokens,
            document_tokens=counts.document_tokens,
            routed_documents=counts.routed_documents,
            routed_chunks=counts.routed_chunks,
            rounds=counts.rounds,
            queue_ms=times.queue * 1000,
            page_in_ms=times.page_in * 1000,
            routing_ms=counts.routing_s * 1000,
            lexical_ms=times.lexical * 1000,
            filter_ms=times.filter * 1000,
            time_to_first_token_ms=times.first_token * 1000,
            total_ms=times.total * 1000,
        )
    )
