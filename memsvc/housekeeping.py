"""What a server does beside its calls: finishes what failed, forgets, and expires.

Every memory is seen to apart: what fails for one is left for the next time, and keeps no other
from its turn.
"""

from __future__ import annotations

import asyncio
import logging

from memsvc.application import Application
from memsvc.clock import SteadyClock
from memsvc.deletion import apart
from memsvc.importing import drop_abandoned
from memsvc.retention import expire
from storage.catalog import MemoryState

log = logging.getLogger(__name__)

_EVERY_S = 600.0


async def keep_house(application: Application) -> None:
    """Every ten minutes, until cancelled."""
    clock = SteadyClock()
    while True:
        await asyncio.sleep(_EVERY_S)
        try:
            await keep_house_once(application, clock)
        except Exception as error:
            # Whatever it was: it must not be the end of housekeeping.
            log.error("housekeeping failed", exc_info=error)


async def keep_house_once(application: Application, clock: SteadyClock) -> None:
    """Drops request ids past their time; finishes deletions and imports that failed half way;
    deletes documents past their memory's retention.
    """
    older_than_s = clock.now_s() - application.config.request_memory_s
    await application.catalog.purge_requests(round(older_than_s * 1e6))
    for memory in await application.catalog.memories_in_state(MemoryState.DELETING):
        with apart(memory):
            await application.writes.finish_deletion(memory)
    for memory in application.deletions.owed.memories():
        with apart(memory):
            await application.writes.finish_removal(memory)
    await drop_abandoned(application)
    await expire(application, round(clock.now_s() * 1e6))
