"""System calls that fail under a server. Longer: python -m tests.fault.crash_loop --target disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fault.crash_loop import SKIPPED, main
from tests.fault.figures import CannotTryError
from tests.fault.loop import Options, crash_loop


async def test_nothing_is_lost_when_the_disk_fails(tmp_path: Path) -> None:
    try:
        figures = await crash_loop(Options(kills=2, target="disk", memories=2), tmp_path)
    except CannotTryError as error:
        pytest.skip(str(error))
    assert sum(figures.disk_errors.values()) == 2


def test_it_says_when_there_is_no_tracer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tests.fault.outages.shutil.which", lambda _: None)
    assert main(["--target", "disk", "--kills", "1"]) == SKIPPED
    assert "need strace" in capsys.readouterr().err
