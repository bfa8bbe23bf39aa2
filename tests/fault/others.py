"""Clients beside the writers: one deletes documents, one asks, one makes and drops memories."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from memsvc.client import (
    Answer,
    AsyncClient,
    DataLossError,
    FailedPreconditionError,
    MemsvcError,
    NotFoundError,
    ResourceExhaustedError,
    Turn,
)
from tests.fault.family import Branch, Family
from tests.fault.figures import CrashLoopError, Figures, persist
from tests.fault.ledger import Ledger

CALL_S = 20.0
T = TypeVar("T")


async def must_be_gone(
    client: AsyncClient, document: str, figures: Figures, rng: random.Random
) -> None:
    """Looks for a document that was deleted. Raises CrashLoopError when it is there."""
    documents = client.memory(document.split("/")[1]).documents
    try:
        await persist(lambda: documents.get(document, timeout_s=CALL_S), figures, rng, "a look")
    except NotFoundError:
        return
    raise CrashLoopError(f"{document} was deleted and is readable")


async def delete_document(
    client: AsyncClient, document: str, figures: Figures, rng: random.Random
) -> int:
    """Deletes it until that is acknowledged, and looks for it after. Returns the revision."""
    documents = client.memory(document.split("/")[1]).documents
    request_id = f"delete-{document.replace('/', '-')}"

    async def delete() -> int:
        return await documents.delete([document], request_id=request_id, timeout_s=CALL_S)

    revision = await persist(delete, figures, rng, "a deletion")
    figures.deletions_acked += 1
    await must_be_gone(client, document, figures, rng)
    return revision


async def delete_memory(
    client: AsyncClient, memory: str, figures: Figures, rng: random.Random
) -> None:
    """Deletes it until that is acknowledged, and looks for it after."""

    async def delete() -> None:
        await client.memories.delete(memory, allow_missing=True, timeout_s=CALL_S)

    await persist(delete, figures, rng, "the deletion of a memory")
    figures.memories_deleted += 1
    try:
        await persist(lambda: client.memories.get(memory, timeout_s=CALL_S), figures, rng, "a look")
    except NotFoundError:
        return
    raise CrashLoopError(f"{memory} was deleted and is readable")


class Deleter:
    """Deletes documents that writers of one memory have stored, and looks for them after."""

    def __init__(self, ledgers: Sequence[Ledger], rng: random.Random, figures: Figures) -> None:
        self._ledgers = ledgers
        self._rng = rng
        self._figures = figures

    async def run(self, client: AsyncClient, pause: asyncio.Event) -> None:
        """Deletes until `pause` is set, then ends with nothing in flight."""
        while not pause.is_set():
            await asyncio.sleep(self._rng.uniform(0.02, 0.2))
            ledger = self._rng.choice(self._ledgers)
            candidates = ledger.deletable()
            if candidates:
                await self._delete(client, ledger, self._rng.choice(candidates))

    async def _delete(self, client: AsyncClient, ledger: Ledger, text: str) -> None:
        ledger.deleted[text] = False
        await delete_document(client, ledger.documents[text], self._figures, self._rng)
        ledger.deleted[text] = True


class Asker:
    """Asks a memory and its forks; an answer must see what was acknowledged and nothing that was
    deleted.

    spoiled: blocks are being damaged.
    """

    def __init__(
        self, family: Family, rng: random.Random, figures: Figures, *, spoiled: bool
    ) -> None:
        self._family = family
        self._spoiled = spoiled
        self._rng = rng
        self._figures = figures

    async def run(self, client: AsyncClient, pause: asyncio.Event) -> None:
        """Asks until `pause` is set."""
        while not pause.is_set():
            await asyncio.sleep(self._rng.uniform(0.05, 0.3))
            branch = self._rng.choice(self._family.branches())
            revision = max(ledger.revision for ledger in branch.ledgers())
            gone = set[str]().union(*(ledger.gone() for ledger in branch.ledgers()))
            answer = await self._ask(client, branch, revision)
            if answer is None:
                continue
            self._figures.answers += 1
            if answer.done.revision < revision:
                raise CrashLoopError(f"an answer saw {answer.done.revision} of {revision}")
            if quoted := gone.intersection(citation.document for citation in answer.citations):
                raise CrashLoopError(f"an answer quotes what was deleted before: {quoted}")

    async def _ask(self, client: AsyncClient, branch: Branch, revision: int) -> Answer | None:
        """None when it was cut short, or could not be answered in time."""
        memory = client.memory(branch.memory)
        writer = self._rng.choice(branch.ledgers()).writer
        try:
            return await memory.ask(
                f"What does {writer} remember?", at_least_revision=revision, timeout_s=CALL_S
            )
        except (ResourceExhaustedError, FailedPreconditionError):
            return None
        except NotFoundError:
            # A fork may be deleted meanwhile.
            if branch in self._family.branches():
                raise
            return None
        except DataLossError:
            # More blocks were spoiled on purpose than one question mends.
            if not self._spoiled:
                raise
            return None
        except MemsvcError as error:
            self._figures.excuse(error)
            return None


class Mover:
    """Makes a memory, exports it, imports the archive, deletes both; again and again.

    spoiled: blocks are being damaged. first: what names and request ids are counted from.
    """

    def __init__(self, rng: random.Random, figures: Figures, *, spoiled: bool, first: int) -> None:
        self._rng = rng
        self._figures = figures
        self._spoiled = spoiled
        self._made = first

    async def run(self, client: AsyncClient, pause: asyncio.Event) -> None:
        """Whole rounds until `pause` is set; then none of its memories is left."""
        while not pause.is_set():
            self._made += 1
            await self._round(client, f"moved-{self._made}")
            await asyncio.sleep(self._rng.uniform(0.0, 0.2))

    async def _round(self, client: AsyncClient, name: str) -> None:
        copy = f"{name}-copy"
        turns = [Turn("user", f"{name} fact {n}") for n in range(4)]
        memory = client.memory(name)
        await self._do(lambda: client.memories.create(name, request_id=name, timeout_s=CALL_S))
        await self._do(lambda: memory.append(turns, request_id=f"{name}-a", timeout_s=CALL_S))
        try:
            await memory.ask("Is it encoded, so that blocks move along?", timeout_s=CALL_S)
        except (ResourceExhaustedError, FailedPreconditionError):
            pass
        except DataLossError:
            if not self._spoiled:
                raise
        except MemsvcError as error:
            self._figures.excuse(error)

        async def export() -> bytes:
            return b"".join([part.data async for part in memory.export(timeout_s=CALL_S)])

        archive = await self._do(export)
        imported = await self._do(
            lambda: client.memories.import_archive(
                archive, memory_id=copy, request_id=copy, timeout_s=CALL_S
            )
        )
        if imported.memory.document_count != len(turns):
            raise CrashLoopError(f"{copy} has {imported.memory.document_count} documents")
        self._figures.imports_acked += 1
        for each in (copy, name):
            await delete_memory(client, each, self._figures, self._rng)

    async def _do(self, call: Callable[[], Awaitable[T]]) -> T:
        return await persist(call, self._figures, self._rng, "moving a memory")
