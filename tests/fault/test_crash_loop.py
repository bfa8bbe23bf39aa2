"""The crash loop, short. Longer: python -m tests.fault.crash_loop --kills 200."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fault.crash_loop import SKIPPED, Options, crash_loop, main
from tests.fault.figures import CannotTryError, Figures


async def run(folder: Path, target: str, kills: int) -> Figures:
    options = Options(kills=kills, target=target, memories=2, most_acks_between_kills=20)
    figures = await crash_loop(options, folder)
    assert figures.kills >= kills
    assert figures.turns_acked >= 10
    return figures


@pytest.mark.parametrize(("target", "kills"), [("server", 3), ("worker", 1)])
async def test_nothing_is_lost(tmp_path: Path, target: str, kills: int) -> None:
    figures = await run(tmp_path, target, kills)
    assert figures.kills_server + figures.kills_worker == kills


async def test_a_server_dies_where_it_is_told(tmp_path: Path) -> None:
    figures = await run(tmp_path, "points", 3)
    assert figures.kills_at


def test_the_command_refuses_an_unknown_target(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--target", "moon"])
    assert "moon" in capsys.readouterr().err


def test_it_says_when_the_machine_cannot(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert main(["--target", "host"]) == SKIPPED
    assert "SKIPPED: power cuts need root" in capsys.readouterr().err


async def test_a_power_cut_loses_nothing_acknowledged(tmp_path: Path) -> None:
    try:
        figures = await run(tmp_path, "host", 2)
    except CannotTryError as error:
        pytest.skip(str(error))
    assert figures.power_cuts == 2
