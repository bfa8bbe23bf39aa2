"""What the pipeline carries, and what it remembers of a model."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from memsvc.encoding.plan import Job, Troubles
from memsvc.encoding.pressure import Backlog, Rate
from memsvc.encoding.texts import Texts


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
