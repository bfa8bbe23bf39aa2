"""A client that forks a memory and its forks, and works on the forks."""

from __future__ import annotations

import asyncio
import random

from memsvc.client import AsyncClient, Forked, Restored, Turn, Written
from tests.fault.family import Family, Fork
from tests.fault.figures import CrashLoopError, Figures, persist
from tests.fault.others import CALL_S, delete_document, delete_memory, must_be_gone

#: Forks of one memory that are there at a time.
_MOST = 3
#: Calls to fork whose client goes away before it is told what came of it.
_LEFT_SHARE = 0.25
_LEFT_AFTER_S = 0.05


class Forker:
    """Forks, now and as of the past, and appends to forks, deletes from them, takes them back to
    an earlier revision and deletes them, parents of others among them."""

    def __init__(self, family: Family, rng: random.Random, figures: Figures) -> None:
        self._family = family
        self._rng = rng
        self._figures = figures

    async def run(self, client: AsyncClient, pause: asyncio.Event) -> None:
        """One thing after another until `pause` is set."""
        while not pause.is_set():
            forks = self._family.forks
            steps = [self._append, self._append, self._delete, self._restore, self._drop]
            if len(forks) < _MOST and (not forks or self._rng.random() < 0.5):
                await self._fork(client)
            elif forks:
                await self._rng.choice(steps)(client, self._rng.choice(forks))
            await asyncio.sleep(self._rng.uniform(0.0, 0.1))

    async def _fork(self, client: AsyncClient) -> None:
        parent = self._rng.choice(self._family.branches())
        past = parent.past()
        then = self._rng.choice(past) if past and self._rng.random() < 0.5 else None
        least = max(past, default=0) if then is None else then
        fork = self._family.begin(parent)

        async def make() -> Forked:
            return await client.memory(parent.memory).fork(
                fork.memory, as_of=then, request_id=fork.memory, timeout_s=CALL_S
            )

        leaves = self._rng.random() < _LEFT_SHARE
        try:
            async with asyncio.timeout(self._rng.uniform(0, _LEFT_AFTER_S) if leaves else None):
                made = await persist(make, self._figures, self._rng, "a fork")
        except TimeoutError:
            self._figures.forks_given_up += 1
            self._family.doubtful.append(fork)
            return
        revision = made.memory.forked_revision
        if revision < least or then not in {None, revision}:
            raise CrashLoopError(f"{fork.memory} is of revision {revision}, {then or least} asked")
        fork.made(revision)
        self._family.forks.append(fork)
        self._figures.forks_acked += 1

    async def _append(self, client: AsyncClient, fork: Fork) -> None:
        texts = fork.own.send(self._rng.randint(1, 3))
        request_id = f"{fork.memory}-{len(fork.own.sent)}"
        turns = [Turn("user", text, speaker=fork.memory) for text in texts]

        async def append() -> Written:
            return await client.memory(fork.memory).append(
                turns, request_id=request_id, timeout_s=CALL_S
            )

        written = await persist(append, self._figures, self._rng, "an append to a fork")
        fork.own.acknowledge(texts, written.documents, written.revision)
        self._figures.appends_acked += 1
        self._figures.turns_acked += len(texts)

    async def _delete(self, client: AsyncClient, fork: Fork) -> None:
        candidates = fork.deletable()
        if candidates:
            text = self._rng.choice(list(candidates))
            fork.delete(text, done=False)
            fork.own.revision = await delete_document(
                client, candidates[text], self._figures, self._rng
            )
            fork.delete(text, done=True)

    async def _restore(self, client: AsyncClient, fork: Fork) -> None:
        past = fork.past()
        if not past:
            return
        then = self._rng.choice(past)
        doomed = fork.added_after(then)
        request_id = f"{fork.memory}-back-{fork.own.revision}"
        for text in doomed:
            fork.delete(text, done=False)

        async def restore() -> Restored:
            return await client.memory(fork.memory).restore(
                then, request_id=request_id, timeout_s=CALL_S
            )

        restored = await persist(restore, self._figures, self._rng, "going back")
        if restored.documents_removed != len(doomed) or restored.revision <= fork.own.revision:
            raise CrashLoopError(f"{fork.memory} back to {then}: {restored}, not {doomed}")
        fork.own.revision = restored.revision
        self._figures.restores_acked += 1
        for text, document in doomed.items():
            fork.delete(text, done=True)
            await must_be_gone(client, document, self._figures, self._rng)

    async def _drop(self, client: AsyncClient, fork: Fork) -> None:
        # First, so that nobody asks it any more.
        self._family.forks.remove(fork)
        await delete_memory(client, fork.memory, self._figures, self._rng)
