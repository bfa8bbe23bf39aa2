"""What the pipeline carries, and what it remembers of a model."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from memsvc.config import KIB
from memsvc.encoding.plan import Job, Troubles
from memsvc.encoding.pressure import Backlog, Rate
from memsvc.encoding.texts import Texts

#: A batch is sized to keep the worker busy this long: short enough that a new
#: memory's first document is not long in waiting, long enough to hide the calls around it.
_BATCH_TARGET_S = 2.5
_MIN_BATCH_BYTES = 8 * KIB


@dataclass
class Batch:
    """Documents of one memory that go to the worker together.

    above: the watermark that they begin at. up_to: the one that they move it to.
    """

    job: Job
    texts: Texts
    above: int
    up_to: int
    previous: asyncio.Future[bool] | None
    committed: asyncio.Future[bool]
    quarantined: dict[int, str]
    alone: bool
    documents: int = 0
    tokens: int = 0
    stored_bytes: int = 0

    @property
    def size(self) -> int:
        """Documents sent to the worker."""
        return len(self.texts.documents)


@dataclass
class ModelState:
    """What outlives one worker of a model."""

    rate: Rate = field(default_factory=Rate)
    backlog: Backlog = field(default_factory=Backlog)
    troubles: Troubles = field(default_factory=Troubles)

    @property
    def batch_bytes(self) -> int:
        """Bytes of text that the worker is wanted to have in one batch."""
        return max(int(self.rate.bytes_per_s * _BATCH_TARGET_S), _MIN_BATCH_BYTES)
