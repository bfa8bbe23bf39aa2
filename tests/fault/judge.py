"""What a crash loop must find when everything runs again."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from memsvc.check import Severity, check_data
from memsvc.client import AsyncClient, Conversation, MemsvcError, NotFoundError
from memsvc.config import Config
from tests.fault.family import Branch, Family
from tests.fault.figures import CrashLoopError, Figures
from tests.fault.ledger import Ledger, Stored, problems

_ANSWER_S = 90.0
#: More than a crash loop ever stores.
_NO_DOCUMENT = 10**9


async def verify(
    client: AsyncClient, families: Sequence[Family], config: Config, figures: Figures
) -> None:
    """Every turn is where it must be, every memory answers, `check` is clean.

    Forks of which nobody knew whether they are there are known afterwards. Raises
    CrashLoopError naming what is not so.
    """
    for family in families:
        for branch in family.branches():
            await _settled(client, branch.memory)
    listed = {memory.id: memory.forked_revision async for memory in client.memories.iterate()}
    for family in families:
        family.settle(listed)
    branches = [branch for family in families for branch in family.branches()]
    memories = sorted(branch.memory for branch in branches)
    found = [] if memories == sorted(listed) else [f"{sorted(listed)} instead of {memories}"]
    figures.turns_stored = 0
    for branch in branches:
        found += [f"{branch.memory}: {one}" for one in await _look(client, branch, figures)]
    found += await _check(config, figures)
    figures.verifications += 1
    if found:
        shown = "\n".join(found[:20])
        raise CrashLoopError(f"{len(found)} problems, the first of them:\n{shown}")


async def _look(client: AsyncClient, branch: Branch, figures: Figures) -> list[str]:
    """What is wrong with one memory."""
    try:
        stored = await read_memory(client, branch.memory)
    except NotFoundError:
        return ["not there"]
    figures.turns_stored += len(stored)
    ledgers = branch.ledgers()
    return problems(ledgers, stored) + await _ask(client, branch.memory, ledgers, stored)


async def _check(config: Config, figures: Figures) -> list[str]:
    damage: list[str] = []
    async for finding in check_data(config):
        if finding.severity is Severity.DAMAGE:
            damage.append(f"check: {finding}")
        else:
            figures.leftovers_seen += 1
    return damage


async def _settled(client: AsyncClient, memory: str) -> None:
    """Returns when no write is under way: one whose client was cut off goes on to its end,
    and whoever writes next waits for it."""
    with suppress(NotFoundError):
        await client.memory(memory).documents.delete(
            [f"memories/{memory}/documents/{_NO_DOCUMENT}"]
        )


async def read_memory(client: AsyncClient, memory: str) -> list[Stored]:
    """Every turn that the memory holds, by document."""
    stored = []
    async for document in client.memory(memory).documents.iterate(page_size=100, full=True):
        if not isinstance(document.source, Conversation):
            raise CrashLoopError(f"{document.name} is no conversation")
        for turn in document.source.turns:
            stored.append(Stored(document.name, document.number, turn.text))
    return stored


async def _ask(
    client: AsyncClient, memory: str, ledgers: Sequence[Ledger], stored: Sequence[Stored]
) -> list[str]:
    """An answer must see every document that is there."""
    revision = max(ledger.revision for ledger in ledgers)
    question = f"What does {ledgers[0].writer} remember?"
    try:
        answer = await client.memory(memory).ask(
            question, at_least_revision=revision, timeout_s=_ANSWER_S
        )
    except MemsvcError as error:
        return [f"no answer: {error}"]
    if answer.done.revision < revision:
        return [f"the answer saw revision {answer.done.revision} of {revision}"]
    if answer.usage is None or answer.usage.routed_documents != len(stored):
        again = await client.memory(memory).ask(question, timeout_s=_ANSWER_S)
        later = [one.number for one in await read_memory(client, memory)]
        return [
            f"the answer at {answer.done.revision} saw {answer.usage} of {len(stored)} documents;"
            f" asked again at {again.done.revision}: {again.usage}; numbers"
            f" {[one.number for one in stored]}, read again: {later}"
        ]
    return []
