"""What is measured before an adapter's settings are chosen, on a tiny base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.quality import choices
from tests.support.tiny_banks import harbour
from tests.support.tiny_checkpoints import write_gguf


def _options(folder: Path, **more: str) -> list[str]:
    write_gguf(folder / "Tiny.gguf")
    options = {
        "bank": str(harbour(folder)),
        "model": str(folder / "Tiny.gguf"),
        "cache": str(folder / "cache"),
        "weights": "0,1",
        "put-in": "1:0,2:0",
        "declines": "0,0.5",
        **more,
    }
    return [part for name, value in options.items() for part in (f"--{name}", value)]


def test_every_choice_has_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert choices.main([*_options(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["weights"]) == {"0.0", "1.0"}
    wanted = {f"{count}:0:{share}" for count in (1, 2) for share in (0.0, 0.5)}
    assert set(found["readings"]) == {*wanted, "gold:0.0", "gold:0.5"}
    for name, figures in found["readings"].items():
        assert 0 <= figures["f1"] <= 1
        assert not name.startswith("gold") or figures["cites_gold"] == 1.0
    assert found["weights"]["1.0"]["recall@10"] > 0, "words find what a question shares with a text"


def test_questions_of_a_table_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = []
    for besides in ("0", "1"):
        assert choices.main([*_options(tmp_path, besides=besides), "--json"]) == 0
        counts.append(json.loads(capsys.readouterr().out)["questions"])
    assert counts[1] == counts[0] - 1


def test_what_cannot_be_loaded_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("bank", "adapter"):
        assert choices.main(_options(tmp_path, **{option: str(tmp_path / "none")})) == 2
        assert "Error: no " in capsys.readouterr().err
