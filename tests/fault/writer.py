"""A client that writes without pause, and what a crash loop counts."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field

from memsvc.client import (
    AsyncClient,
    CallCancelledError,
    DeadlineExceededError,
    ResourceExhaustedError,
    Turn,
    UnavailableError,
)
from tests.fault.ledger import Ledger

_CALL_S = 20.0
_GIVEN_UP_SHARE = 0.2


@dataclass
class Figures:
    """What a run did. Times in seconds."""

    kills_server: int = 0
    kills_worker: int = 0
    kills_while_starting: int = 0
    drains: int = 0
    appends_acked: int = 0
    appends_repeated: int = 0
    appends_given_up: int = 0
    appends_held_back: int = 0
    turns_acked: int = 0
    turns_stored: int = 0
    verifications: int = 0
    leftovers_seen: int = 0
    seconds: float = 0.0
    by_error: dict[str, int] = field(default_factory=dict)


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
        handle = client.memory(self.ledger.memory)
        while not pause.is_set():
            texts = self.ledger.send(self._rng.randint(1, 4))
            request_id = f"{self.ledger.writer}-{len(self.ledger.sent)}"
            give_up = self._rng.random() < _GIVEN_UP_SHARE
            while True:
                try:
                    written = await handle.append(
                        [Turn("user", text, speaker=self.ledger.writer) for text in texts],
                        request_id=request_id,
                        timeout_s=_CALL_S,
                    )
                except ResourceExhaustedError as error:
                    if error.retry_after_s is None:
                        raise
                    # The queue is full while workers die; nothing was written.
                    self._figures.appends_held_back += 1
                    await asyncio.sleep(error.retry_after_s)
                except (UnavailableError, CallCancelledError, DeadlineExceededError) as error:
                    kind = getattr(error, "reason", "") or type(error).__name__
                    self._figures.by_error[kind] = self._figures.by_error.get(kind, 0) + 1
                    if give_up:
                        self._figures.appends_given_up += 1
                        break
                    self._figures.appends_repeated += 1
                    await asyncio.sleep(self._rng.uniform(0.01, 0.1))
                else:
                    self.ledger.acknowledge(texts, written.documents, written.revision)
                    self._figures.appends_acked += 1
                    self._acked.set()
                    await asyncio.sleep(self._rng.uniform(0.0, self._longest_pause_s))
                    break
