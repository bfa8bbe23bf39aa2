"""The crash loop, short. Longer: python -m tests.fault.crash_loop --kills 200."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path

import pytest

from tests.fault.crash_loop import SKIPPED, STOPPED, main
from tests.fault.figures import CannotTryError, Figures
from tests.fault.loop import Options, Verified, crash_loop
from tests.fault.rounds import ROUND, run_rounds


async def run(folder: Path, target: str, kills: int) -> Figures:
    options = Options(kills=kills, target=target, memories=2, most_acks_between_kills=20)
    figures = await crash_loop(options, folder)
    assert figures.kills >= kills
    assert figures.turns_acked >= 10
    assert figures.forks_acked + figures.forks_given_up >= 1
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


def counted(kills: int) -> Figures:
    return Figures(kills_server=kills, kills_at={"here": kills}, seconds=1.5)


async def test_all_targets_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[str, int, int]] = []
    told: list[int] = []
    missing: list[int] = []

    async def one(options: Options, folder: Path, verified: Verified) -> Figures:
        assert folder.name == f"round-{len(ran) + len(missing) + 1}"
        if options.target == "disk":
            missing.append(options.seed)
            raise CannotTryError("no strace")
        ran.append((options.target, options.kills, options.seed))
        verified(counted(1))
        return counted(options.kills)

    monkeypatch.setattr("tests.fault.rounds.crash_loop", one)
    options = Options(kills=300, target="all", seed=7)
    skipped = await run_rounds(options, tmp_path, lambda figures: told.append(figures.kills))
    assert skipped == ["disk: no strace"]
    assert sum(kills for _, kills, _ in ran) == 300
    assert [target for target, _, _ in ran[:5]] == [name for name in ROUND if name != "disk"]
    assert ran[5:7] == [("points", 60, 13), ("server", 50, 14)]
    # Each was told together with all the rounds before it.
    assert told[:3] == [1, 61, 111]


async def test_where_nothing_can_be_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def one(*_: object) -> Figures:
        raise CannotTryError("not here")

    monkeypatch.setattr("tests.fault.rounds.crash_loop", one)
    with pytest.raises(CannotTryError, match="points: not here"):
        await run_rounds(Options(target="all"), tmp_path, lambda _: None)


def test_a_run_that_is_stopped_says_what_it_verified(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def one(_options: Options, _folder: Path, verified: Verified) -> Figures:
        verified(counted(25))
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(60)
        raise AssertionError

    monkeypatch.setattr("tests.fault.crash_loop.crash_loop", one)
    assert main(["--kills", "50", "--json"]) == STOPPED
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert (told["complete"], told["kills_server"], told["kills"]) == (False, 25, 50)
    assert err.startswith("25 kills, ")
