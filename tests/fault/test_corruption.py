"""The corruption campaign, short. Longer: python -m tests.fault.corruption --flips 10000."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.fault.corruption import campaign, main
from tests.fault.corruption_child import Damage, choose
from tests.fault.subjects import DETECTED, HARMLESS, SUBJECTS, WRONG, StoreSubject, _worst


def test_every_damage_is_detected_or_harmless() -> None:
    outcomes = campaign(flips=120, torn=40, cuts=12, seed=1)
    assert outcomes.bad == []
    assert outcomes.trials == 172 == outcomes.counts.total()
    for name in SUBJECTS:
        assert outcomes.counts[f"{name} flip detected"]
        assert outcomes.counts[f"{name} torn detected"]


def test_a_process_that_dies_fails_the_campaign() -> None:
    outcomes = campaign(flips=2, torn=0, cuts=0, seed=0, subjects=["nonsense"])
    assert (outcomes.crashes, outcomes.wrong, len(outcomes.bad)) == (2, 0, 2)


@pytest.mark.parametrize("name", list(SUBJECTS))
def test_what_is_sound_is_harmless(name: str, tmp_path: Path) -> None:
    SUBJECTS[name].make(tmp_path)
    assert SUBJECTS[name].judge(tmp_path) == HARMLESS


def test_another_content_under_a_sound_checksum_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = StoreSubject(encrypted=True)
    subject.make(tmp_path)
    monkeypatch.setattr("tests.fault.subjects._TOKENS", 61)
    assert subject.judge(tmp_path).startswith(WRONG)
    assert _worst({HARMLESS, DETECTED, f"{WRONG}: it"}) == f"{WRONG}: it"


def test_each_kind_of_damage() -> None:
    sound = bytes(range(256)) * 64
    rng = random.Random(0)
    for _ in range(50):
        flipped = choose(sound, "flip", rng).apply(sound)
        changed = [a ^ b for a, b in zip(sound, flipped, strict=True) if a != b]
        assert len(changed) == 1 and changed[0].bit_count() == 1
        assert len(choose(sound, "torn", rng).apply(sound)) == len(sound)
        assert sound.startswith(choose(sound, "cut", rng).apply(sound))
    assert Damage(2, b"xy", 5).apply(b"abcdef") == b"abxye"


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--flips", "4", "--torn", "0", "--cuts", "0"]) == 0
    assert "wrong answers 0, crashes 0" in capsys.readouterr().out
