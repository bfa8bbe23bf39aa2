"""Query: order of events, counts, limits, repeatability, cancellation."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from model_adapter.conformance.harness import TEXTS, Harness, Memory
from model_adapter.conformance.report import require
from model_adapter.v1 import model_adapter_pb2 as pb

#: Time for a cancelled call's work to end: a step, and a batch of encoding before it.
_STOP_S = 10.0
_ANSWER_TOKENS = 16


def _request(h: Harness, memory: Memory, question: str, **more: Any) -> pb.QueryRequest:
    more.setdefault("max_answer_tokens", min(_ANSWER_TOKENS, h.info.max_answer_tokens))
    return pb.QueryRequest(memory=h.reference(memory), question=question, **more)


async def events(h: Harness) -> None:
    """Sends routing first and Finished last, once, with counts that agree with the events."""
    memory = await h.memory()
    found = await h.answer(_request(h, memory, TEXTS[0]))
    kinds = [event.WhichOneof("event") for event in found]
    require(kinds.count("finished") == 1, f"Finished came {kinds.count('finished')} times")
    require(kinds[-1] == "finished", f"the last event is {kinds[-1]}, not finished")
    require(kinds[0] == "routing", f"the first event is {kinds[0]}, not routing")
    rounds = [event.routing.round for event in found if event.WhichOneof("event") == "routing"]
    require(rounds == list(range(1, len(rounds) + 1)), f"rounds are numbered {rounds}")
    cited = [event.citation.number for event in found if event.WhichOneof("event") == "citation"]
    strangers = sorted(set(cited) - set(range(1, memory.last + 1)))
    require(not strangers, f"cited documents {strangers} are not in the memory")
    done = found[-1].finished
    require(done.reason != pb.Finished.REASON_UNSPECIFIED, "Finished gives no reason")
    require(done.rounds == len(rounds), f"{done.rounds} rounds, {len(rounds)} routing events")
    require(done.question_tokens > 0, "question_tokens is 0")
    looked_at = done.routed_documents
    require(looked_at == memory.last, f"routed_documents is {looked_at} of {memory.last}")


async def limits(h: Harness) -> None:
    """Generates no more than max_answer_tokens, and says so."""
    memory = await h.memory()
    for most in (1, 3):
        found = await h.answer(_request(h, memory, TEXTS[0], max_answer_tokens=most))
        done = found[-1].finished
        require(done.answer_tokens <= most, f"{done.answer_tokens} tokens; {most} were allowed")
        pieces = [e.text.text for e in found if e.WhichOneof("event") == "text"]
        require(
            len(pieces) <= most, f"{len(pieces)} pieces of text where {most} tokens were allowed"
        )


async def empty(h: Harness) -> None:
    """Routes to nothing in an empty memory, and still answers."""
    memory = await h.memory(())
    require(not await h.route(h.reference(memory), TEXTS[0]), "documents of an empty memory")
    found = await h.answer(_request(h, memory, TEXTS[0]))
    require(bool(found) and found[-1].HasField("finished"), "no Finished for an empty memory")


async def repeatable(h: Harness) -> None:
    """Answers alike when asked alike, and from the same documents beside other questions.

    Beside others a token may differ: arithmetic in larger batches rounds differently.
    """
    memory = await h.memory()
    first, again = [await h.answer(_request(h, memory, TEXTS[1])) for _ in range(2)]
    require(_text(first) == _text(again), "the same question has two greedy answers")
    beside = await asyncio.gather(*(h.answer(_request(h, memory, text)) for text in TEXTS[:4]))
    alone, among = _cited(first), _cited(beside[1])
    require(alone == among, f"cites {among} beside other questions, {alone} alone")


async def cancelled_query(h: Harness) -> None:
    """Stops when the caller leaves: nothing runs or waits soon after."""
    memory = await h.memory(tuple(f"{text} " * 8 for text in TEXTS))
    calls = [
        h.stub.Query(_request(h, memory, text, max_answer_tokens=h.info.max_answer_tokens))
        for text in TEXTS
    ]
    await calls[0].read()
    for call in calls:
        call.cancel()
    require(await h.quiet(_STOP_S), f"work goes on {_STOP_S:g} s after its callers left")


async def cancelled_encode(h: Harness) -> None:
    """Drops what waits to be encoded when the caller leaves."""
    text = " ".join(TEXTS)
    began = time.monotonic()
    h.block((await h.encode([(1, text)]))[1])
    one_s = time.monotonic() - began
    request = pb.EncodeRequest(
        tenant=h.tenant,
        memory_uid="c0" * 16,
        identity=h.info.identity,
        documents=[pb.DocumentText(number=n, text=f"{n} {text}") for n in range(1, 257)],
    )
    calls = [h.stub.Encode(request) for _ in range(4)]
    await calls[0].read()
    for call in calls:
        call.cancel()
    began = time.monotonic()
    h.block((await h.encode([(1, text)]))[1])
    took_s = time.monotonic() - began
    allowed_s = _STOP_S + 4 * one_s
    require(took_s < allowed_s, f"a document waits {took_s:.1f} s behind cancelled requests")


def _cited(events: list[pb.QueryResponse]) -> list[int]:
    return [e.citation.number for e in events if e.WhichOneof("event") == "citation"]


def _text(events: list[pb.QueryResponse]) -> str:
    return "".join(event.text.text for event in events)
