"""What a worker must refuse, each with its typed error: identities, limits, malformed requests."""

from __future__ import annotations

import grpc

from model_adapter.conformance.harness import TEXTS, Harness, Memory, refused
from model_adapter.conformance.report import SkippedError, require
from model_adapter.v1 import model_adapter_pb2 as pb
from model_adapter.wire import MAX_DOCUMENTS, MAX_MESSAGE_BYTES

_INVALID = grpc.StatusCode.INVALID_ARGUMENT
_WORD = "word "


async def identity(h: Harness) -> None:
    """Refuses to encode for, route in or answer from blocks of another identity."""
    other = ("0" if h.info.identity[0] != "0" else "1") + h.info.identity[1:]
    code, reason = grpc.StatusCode.FAILED_PRECONDITION, "MODEL_MISMATCH"
    await refused(h.encode([(1, TEXTS[0])], identity=other), code, reason, "Encode")
    reference = h.reference(Memory(h.tenant, "c0" * 16, 1))
    reference.identity = other
    await refused(h.route(reference, "boat"), code, reason, "Route")
    query = pb.QueryRequest(memory=reference, question="boat", max_answer_tokens=1)
    await refused(h.answer(query), code, reason, "Query")


async def long_document(h: Harness) -> None:
    """Refuses one document that is too long; the others of the request are encoded."""
    limit = h.info.max_document_tokens
    text = _WORD * (limit + 1)
    if len(text) > MAX_MESSAGE_BYTES - 4096:
        raise SkippedError(f"a text of {limit} tokens fits no message")
    replies = await h.encode([(1, TEXTS[0]), (2, text), (3, TEXTS[1])])
    require(sorted(replies) == [1, 2, 3], f"only documents {sorted(replies)} are answered")
    failure = replies[2].failure
    refused_it = replies[2].WhichOneof("result") == "failure"
    require(refused_it, f"a document of more than max_document_tokens ({limit}) is encoded")
    require(failure.reason == "DOCUMENT_TOO_LONG", f"the reason is {failure.reason!r}")
    stated = failure.metadata.get("limit", "")
    require(stated.isdecimal(), f"metadata.limit is {stated!r}, not a number of tokens")
    for number in (1, 3):
        h.block(replies[number])


async def long_question(h: Harness) -> None:
    """Refuses a question of more than max_question_tokens, in Route and in Query."""
    memory = await h.memory(TEXTS[:2])
    question = _WORD * (h.info.max_question_tokens + 1)
    reference = h.reference(memory)
    await refused(h.route(reference, question), _INVALID, "QUESTION_TOO_LONG", "Route")
    query = pb.QueryRequest(memory=reference, question=question, max_answer_tokens=1)
    await refused(h.answer(query), _INVALID, "QUESTION_TOO_LONG", "Query")


async def malformed(h: Harness) -> None:
    """Refuses requests that make no sense, before any work."""
    invalid = "FIELD_INVALID"
    await refused(h.encode([]), _INVALID, invalid, "Encode of no documents")
    twice = [(1, TEXTS[0]), (1, TEXTS[1])]
    await refused(h.encode(twice), _INVALID, invalid, "Encode of one number twice")
    await refused(h.encode([(0, TEXTS[0])]), _INVALID, invalid, "Encode of number 0")
    many = [(number, "x") for number in range(1, MAX_DOCUMENTS + 2)]
    await refused(h.encode(many), _INVALID, "TOO_MANY_ITEMS", f"Encode of {len(many)} documents")
    await refused(
        h.encode([(1, "x")], tenant="../etc"), _INVALID, invalid, "Encode for the tenant ../etc"
    )
    reference = h.reference(Memory(h.tenant, "c0" * 16, 1))
    for limit in (0, 101):
        what = f"Route with limit {limit}"
        await refused(h.route(reference, "boat", limit), _INVALID, invalid, what)
    await refused(h.route(reference, "  "), _INVALID, invalid, "Route without a question")
    query = pb.QueryRequest(memory=reference, question="boat", temperature=-1)
    await refused(h.answer(query), _INVALID, invalid, "Query with temperature -1")
