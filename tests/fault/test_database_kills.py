"""PostgreSQL killed under a server. Longer: python -m tests.fault.crash_loop --target database."""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.fault.loop import Options, crash_loop


async def test_nothing_is_lost_when_the_database_dies() -> None:
    # Not under pytest's own folder, which only its owner may enter.
    with tempfile.TemporaryDirectory(prefix="memsvc-crash-") as folder:
        figures = await crash_loop(Options(kills=2, target="database", memories=2), Path(folder))
    assert figures.kills_database == 2
    assert figures.by_error
