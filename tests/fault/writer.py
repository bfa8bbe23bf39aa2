"""A client that appends without pause."""

from __future__ import annotations

import asyncio
import random

from memsvc.client import AsyncClient, MemsvcError, ResourceExhaustedError, Turn, Written
from tests.fault.figures import Figures, persist
from tests.fault.ledger import Ledger

_CALL_S = 20.0
_GIVEN_UP_SHARE = 0.2


class Writer:
    """One client that appends to one memory until told to stop."""

    def __init__(
        self,
        ledger: Ledger,
        rng: random.Random,
        figures: Figures,
        acked: asyncio.Event,
        longest_pause_s: float,
    ) -> None:
        self.ledger = ledger
        self._longest_pause_s = longest_pause_s
        self._rng = rng
        self._figures = figures
        self._acked = acked

    async def run(self, client: AsyncClient, pause: asyncio.Event) -> None:
        """Appends until `pause` is set, then ends with nothing in flight."""
        while not pause.is_set():
            texts = self.ledger.send(self._rng.randint(1, 4))
            written = await self._append(client, texts)
            if written is not None:
                self.ledger.acknowledge(texts, written.documents, written.revision)
                self._figures.appends_acked += 1
                self._figures.turns_acked += len(texts)
                self._acked.set()
            await asyncio.sleep(self._rng.uniform(0.0, self._longest_pause_s))

    async def _append(self, client: AsyncClient, texts: list[str]) -> Written | None:
        """None: cut short and given up."""
        turns = [Turn("user", text, speaker=self.ledger.writer) for text in texts]
        request_id = f"{self.ledger.writer}-{len(self.ledger.sent)}"

        async def append() -> Written:
            return await client.memory(self.ledger.memory).append(
                turns, request_id=request_id, timeout_s=_CALL_S
            )

        try:
            return await append()
        except ResourceExhaustedError as error:
            if error.retry_after_s is None and not self._figures.dark:
                raise
            # The queue is full while workers die, or the disk; nothing was written.
            self._figures.appends_held_back += 1
            await asyncio.sleep(error.retry_after_s or 0.1)
        except MemsvcError as error:
            self._figures.excuse(error)
            if self._rng.random() < _GIVEN_UP_SHARE:
                self._figures.appends_given_up += 1
                return None
            self._figures.appends_repeated += 1
        return await persist(append, self._figures, self._rng, "an append")
