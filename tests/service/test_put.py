from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Iterable

import pytest

from memsvc.api.put import ByteBudget
from memsvc.api_error import ApiError
from memsvc.v1 import memory_service_pb2 as pb
from memsvc.v1 import resources_pb2 as resources
from tests.support.served import Served, refused

Message = pb.PutDocumentsRequest
MEMORY = "memories/shelf"


def header(memory: str = MEMORY, request_id: str = "") -> Message:
    return Message(header=Message.Header(memory=memory, request_id=request_id))


def begin(title: str = "", **metadata: str) -> Message:
    return Message(document_start=Message.DocumentStart(title=title, metadata=metadata))


def text(piece: str) -> Message:
    return Message(text=piece)


def end(documents: int) -> Message:
    return Message(end=Message.End(documents=documents))


async def put(
    served: Served, messages: Iterable[Message], *, ended: bool = True
) -> pb.PutDocumentsResponse:
    """ended: adds the end message that fits."""

    async def stream() -> AsyncIterator[Message]:
        documents = 0
        for message in messages:
            documents += message.HasField("document_start")
            yield message
        if ended:
            yield end(documents)

    reply: pb.PutDocumentsResponse = await served.as_operator(
        served.memories.PutDocuments, stream()
    )
    return reply


async def test_texts_arrive_in_pieces(served: Served) -> None:
    await served.create("shelf")
    reply = await put(
        served,
        [header(), begin("One", lang="en"), text("a"), text(""), text("é"), begin(), text("b")],
    )
    assert reply.revision == 1
    assert list(reply.documents) == [f"{MEMORY}/documents/1", f"{MEMORY}/documents/2"]
    document = await served.as_operator(
        served.memories.GetDocument, pb.GetDocumentRequest(name=reply.documents[0])
    )
    assert document.text == resources.TextSource(title="One", text="aé", metadata={"lang": "en"})
    assert await served.texts(MEMORY) == ["aé", "b"]


async def test_a_large_text_needs_many_messages(served: Served) -> None:
    await served.create("shelf")
    pieces = [text(letter * 262_144) for letter in "abcd"]
    await put(served, [header(), begin(), *pieces])
    assert await served.texts(MEMORY) == ["".join(piece.text for piece in pieces)]


async def test_a_retry_may_cut_the_text_elsewhere(served: Served) -> None:
    await served.create("shelf")
    first = await put(served, [header(request_id="p-1"), begin(), text("ab"), text("c")])
    again = await put(served, [header(request_id="p-1"), begin(), text("a"), text("bc")])
    assert first == again
    assert await served.texts(MEMORY) == ["abc"]
    refusal = await refused(put(served, [header(request_id="p-1"), begin(), text("abd")]))
    assert refusal.reason == "REQUEST_ID_REUSED"
    # Where one text ends and the next begins is part of the payload.
    two = [header(request_id="p-1"), begin(), text("ab"), begin(), text("c")]
    assert (await refused(put(served, two))).reason == "REQUEST_ID_REUSED"


@pytest.mark.parametrize(
    ("messages", "reason", "field"),
    [
        ([header(), begin(), text("a")], "STREAM_PROTOCOL", "message"),
        ([header(), begin(), text("a"), end(2)], "FIELD_INVALID", "end.documents"),
        ([header(), begin(), text("a"), end(1), begin()], "STREAM_PROTOCOL", "message"),
        ([header(), end(0)], "FIELD_REQUIRED", "documents"),
        ([end(0)], "STREAM_PROTOCOL", "message"),
    ],
)
async def test_a_stream_says_that_it_is_whole(
    served: Served, messages: list[Message], reason: str, field: str
) -> None:
    await served.create("shelf")
    refusal = await refused(put(served, messages, ended=False))
    assert (refusal.reason, refusal.field) == (reason, field)
    assert await served.texts(MEMORY) == []


@pytest.mark.parametrize(
    ("messages", "reason", "field"),
    [
        ([], "STREAM_PROTOCOL", "message"),
        ([Message()], "STREAM_PROTOCOL", "message"),
        ([begin(), text("a")], "STREAM_PROTOCOL", "message"),
        ([header(), header()], "STREAM_PROTOCOL", "message"),
        ([header(), text("a")], "STREAM_PROTOCOL", "message"),
        ([header()], "FIELD_REQUIRED", "documents"),
        ([header(), begin()], "FIELD_REQUIRED", "documents[0].text"),
        ([header(), begin(), text("a"), begin(), begin()], "FIELD_REQUIRED", "documents[1].text"),
        ([header("")], "FIELD_REQUIRED", "header.memory"),
        ([header("shelf")], "FIELD_INVALID", "header.memory"),
        ([header(request_id="?")], "FIELD_INVALID", "header.request_id"),
        ([header("memories/absent"), begin(), text("a")], "MEMORY_NOT_FOUND", "header.memory"),
        ([header(), begin("t" * 513)], "TEXT_TOO_LONG", "documents[0].title"),
        ([header(), begin(Bad="x")], "FIELD_INVALID", "documents[0].metadata"),
        ([header(), begin(), text("a"), text("\x00")], "TEXT_NOT_CLEAN", "documents[0].text"),
        ([header(), begin(), *[text("x" * 524_288)] * 3], "TEXT_TOO_LONG", "documents[0].text"),
        ([header(), *[begin(), text("x")] * 1001], "TOO_MANY_ITEMS", "documents"),
        ([header(), *[begin(), text("x" * 2**20)] * 65], "TEXT_TOO_LONG", "documents"),
    ],
)
async def test_bad_streams_write_nothing(
    served: Served, messages: list[Message], reason: str, field: str
) -> None:
    await served.create("shelf")
    refusal = await refused(put(served, messages))
    assert (refusal.reason, refusal.field) == (reason, field)
    assert await served.texts(MEMORY) == []
    # The server is up and nothing of the stream is held.
    await put(served, [header(), begin(), text("fine")])
    assert await served.texts(MEMORY) == ["fine"]


def test_a_budget_is_given_back() -> None:
    budget = ByteBudget(10)
    with budget.share() as first:
        first.take(6)
        with budget.share() as second, pytest.raises(ApiError) as caught:
            second.take(5)
        assert caught.value.retry_after_s is not None
        assert budget.held == 6
    assert budget.held == 0


CLIENT = """
import asyncio, sys
from grpc import aio
from memsvc.v1 import memory_service_pb2 as pb
from memsvc.v1.memory_service_pb2_grpc import MemoryServiceStub

async def messages():
    kind = pb.PutDocumentsRequest
    yield kind(header=kind.Header(memory="memories/shelf"))
    yield kind(document_start=kind.DocumentStart())
    while True:
        yield kind(text="half of it ")
        print("sent", flush=True)
        await asyncio.sleep(0.01)

async def main():
    async with aio.insecure_channel(sys.argv[1]) as channel:
        key = (("authorization", sys.argv[2]),)
        await MemoryServiceStub(channel).PutDocuments(messages(), metadata=key)

asyncio.run(main())
"""


async def test_a_client_that_is_killed_writes_nothing(served: Served) -> None:
    await served.create("shelf")
    ((_, credential),) = served.as_operator.metadata
    for wait in (0.0, 0.05):
        client = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", CLIENT, served.server.address, credential),
            stdout=asyncio.subprocess.PIPE,
        )
        assert client.stdout is not None
        await client.stdout.readline()
        await asyncio.sleep(wait)
        client.kill()
        await client.wait()
    async with asyncio.timeout(5):
        while served.server._gate.calls:  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.01)
    assert await served.texts(MEMORY) == []
