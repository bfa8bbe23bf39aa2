"""Route: what it finds, and what it must not see."""

from __future__ import annotations

import secrets
from datetime import UTC, datetime, timedelta

from model_adapter.conformance.harness import TEXTS, Harness, Memory
from model_adapter.conformance.report import SkippedError, require
from model_adapter.v1 import model_adapter_pb2 as pb
from storage.documents import Conversation, Role, TextSource, Turn
from storage.store import MemoryUid

#: A document quoted as the question is to be among so many of the eight best ...
_AMONG = 3
#: ... for this share of the documents.
_SHARE = 0.5


async def ranking(h: Harness) -> None:
    """Returns documents of the memory, each once, best first, no more than asked for."""
    memory = await h.memory()
    for limit in (1, 3, 100):
        found = await h.route(h.reference(memory), TEXTS[0], limit)
        numbers = [document.number for document in found]
        require(len(found) <= limit, f"{len(found)} documents for a limit of {limit}")
        require(len(set(numbers)) == len(numbers), f"documents repeat: {numbers}")
        require(bool(found), "nothing is found for a question that quotes a document")
        strangers = sorted(set(numbers) - set(range(1, memory.last + 1)))
        require(not strangers, f"documents {strangers} are not in the memory")
        scores = [document.score for document in found]
        require(scores == sorted(scores, reverse=True), f"scores do not descend: {scores}")
        layers = {layer.layer for document in found for layer in document.layers}
        unknown = sorted(layers - set(h.layout.routed_layers))
        require(not unknown, f"layers {unknown} are no routed layers")


async def relevance(h: Harness) -> None:
    """Ranks a document high for a question that quotes it."""
    memory = await h.memory()
    hits, rankings = 0, set()
    for number, text in enumerate(TEXTS, 1):
        found = [d.number for d in await h.route(h.reference(memory), text, len(TEXTS))]
        rankings.add(tuple(found))
        hits += number in found[:_AMONG]
    require(len(rankings) > 1, "every question has the same ranking")
    share = hits / len(TEXTS)
    require(
        share >= _SHARE,
        f"only {hits} of {len(TEXTS)} quoted documents are among the first {_AMONG}",
    )


async def snapshot(h: Harness) -> None:
    """Sees documents up to last_number, and later ones as soon as they are named."""
    memory = await h.memory(TEXTS[:4])
    early = h.reference(memory)
    await h.route(early, TEXTS[0])
    await h.append(memory, TEXTS[4:])
    for reference, last in ((early, 4), (h.reference(memory), 8), (early, 4)):
        for text in TEXTS:
            beyond = [d.number for d in await h.route(reference, text) if d.number > last]
            require(not beyond, f"documents {beyond} lie above last_number {last}")
    seen = {
        d.number for text in TEXTS[4:] for d in await h.route(h.reference(memory), text, len(TEXTS))
    }
    require(bool(seen & {5, 6, 7, 8}), "documents that were added are not found")


async def filters(h: Harness) -> None:
    """Reads a memory as if it held the documents alone that match, as many as are asked for."""
    if not h.info.filters:
        raise SkippedError("GetInfo says that the worker knows no filters")
    kind = pb.DocumentFilter
    day = datetime(2026, 3, 1, tzinfo=UTC)
    told = [
        Conversation((Turn(Role.USER, text, day + timedelta(days=n), "Anna" if n % 2 else "Bob"),))
        for n, text in enumerate(TEXTS[:6], 1)
    ]
    notes = [TextSource(text, metadata={"kind": "note"}) for text in TEXTS[6:]]
    memory = await h.memory([*told, *notes])
    third_us = int((day + timedelta(days=3)).timestamp() * 1_000_000)
    for name, wanted, expected in (
        ("no condition", kind(), {1, 2, 3, 4, 5, 6, 7, 8}),
        ("speakers", kind(speakers=["Anna"]), {1, 3, 5}),
        ("roles", kind(roles=[kind.USER, kind.TOOL]), {1, 2, 3, 4, 5, 6}),
        ("occurred_from_us", kind(occurred_from_us=third_us), {3, 4, 5, 6}),
        ("occurred_before_us", kind(occurred_before_us=third_us), {1, 2}),
        ("metadata", kind(metadata=[kind.Metadata(key="kind", values=["note"])]), {7, 8}),
        ("both", kind(speakers=["Bob"], occurred_from_us=third_us), {4, 6}),
        ("nobody", kind(speakers=["Nobody"]), set[int]()),
    ):
        rankings = [await h.route(h.reference(memory), text, 2, wanted) for text in TEXTS]
        found = [document.number for ranking in rankings for document in ranking]
        beyond = sorted(set(found) - expected)
        require(not beyond, f"documents {beyond} do not match a filter: {name}")
        require(bool(found) == bool(expected), f"nothing is found within a filter: {name}")
    request = pb.QueryRequest(
        memory=h.reference(memory),
        question=TEXTS[0],
        max_answer_tokens=4,
        filter=kind(speakers=["Bob"]),
    )
    cited = {event.citation.number for event in await h.answer(request)} - {0}
    require(cited <= {2, 4, 6}, f"documents {sorted(cited)} are cited, which do not match a filter")


async def deletion(h: Harness) -> None:
    """Forgets a deleted document: at a new deletion epoch, and after Evict."""
    memory = await h.memory()
    uid = MemoryUid(bytes.fromhex(memory.uid))
    await h.route(h.reference(memory), TEXTS[0])
    h.store(memory.tenant).delete_documents(uid, [1])
    await h.stub.Evict(pb.EvictRequest(tenant=memory.tenant, memory_uid=memory.uid), timeout=30)
    for epoch in (1, 2):
        found = await h.route(h.reference(memory, epoch=epoch), TEXTS[epoch - 1])
        gone = sorted({d.number for d in found} & set(range(1, epoch + 1)))
        require(not gone, f"documents {gone} are found after they were deleted")
        h.store(memory.tenant).delete_documents(uid, [epoch + 1])


async def removed(h: Harness) -> None:
    """Reads a memory as if it did not hold what is said to be deleted, though it is stored."""
    if not h.info.removals:
        raise SkippedError("GetInfo says that the worker does not heed what is removed")
    memory = await h.memory()
    reference = h.reference(memory, epoch=1)
    reference.removed.add(first=1, last=1)
    reference.removed.add(first=4, last=6)
    for text in TEXTS:
        found = {document.number for document in await h.route(reference, text, len(TEXTS))}
        gone = sorted(found & {1, 4, 5, 6})
        require(not gone, f"documents {gone} are found, which are said to be removed")
    request = pb.QueryRequest(memory=reference, question=TEXTS[4], max_answer_tokens=4)
    cited = {event.citation.number for event in await h.answer(request)} - {0}
    require(cited <= {2, 3, 7, 8}, f"documents {sorted(cited)} are cited, some removed")


async def eviction(h: Harness) -> None:
    """Evict returns when nothing is held, and what was evicted can be read again."""
    memory = await h.memory(TEXTS[:2])
    before = {d.number for d in await h.route(h.reference(memory), TEXTS[0])}
    request = pb.EvictRequest(tenant=memory.tenant, memory_uid=memory.uid)
    await h.stub.Evict(request, timeout=30)
    again = await h.stub.Evict(request, timeout=30)
    require(again.freed_bytes == 0, f"a second Evict frees {again.freed_bytes} bytes")
    after = {d.number for d in await h.route(h.reference(memory), TEXTS[0])}
    require(before == after, f"{sorted(before)} were found before Evict, then {sorted(after)}")


async def tenants(h: Harness) -> None:
    """Keeps tenants apart, also where their memories have the same uid."""
    memory = await h.memory(TEXTS[:4])
    await h.route(h.reference(memory), TEXTS[0])
    stranger = Memory(secrets.token_hex(16), memory.uid, memory.last)
    h.store(stranger.tenant)
    found = [d.number for d in await h.route(h.reference(stranger), TEXTS[0])]
    require(not found, f"another tenant's documents {found} are found")
