"""The crash loop, short. Longer: python -m tests.fault.crash_loop --kills 200."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fault.crash_loop import Options, crash_loop, main

pytestmark = pytest.mark.xdist_group("crash")


@pytest.mark.parametrize(("target", "kills"), [("server", 5), ("worker", 2)])
async def test_nothing_is_lost(tmp_path: Path, target: str, kills: int) -> None:
    options = Options(kills=kills, target=target, memories=2, most_acks_between_kills=20)
    figures = await crash_loop(options, tmp_path)
    assert figures.kills_server + figures.kills_worker == kills
    assert figures.turns_acked >= 20
    assert figures.turns_stored >= figures.turns_acked


def test_the_command_refuses_an_unknown_target(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--target", "moon"])
    assert "moon" in capsys.readouterr().err
