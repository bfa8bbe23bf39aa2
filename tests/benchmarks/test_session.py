"""The command of a whole GPU session, on a tiny base; tables and bars of results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality import session, tables
from model_adapter.checkpoints import read_adapter
from tests.support.tiny_banks import harbour
from tests.support.training_sets import tiny_settings


def result(bank: str, **recalls: float) -> dict[str, Any]:
    rows = {
        row: {"recall@1": value / 2, "recall@5": value, "recall@10": value, "f1": None}
        for row, value in recalls.items()
    }
    return {"bank": bank, "questions": 1500, "documents": 12, "tokens": 345, "rows": rows}


def test_bars_are_met_or_missed() -> None:
    results = [
        result("one", ours=0.9, hybrid=0.95, bm25=0.8, minilm=0.7),
        result("two", ours=0.7, hybrid=0.8, bm25=0.6, minilm=0.6),
        result("three", ours=0.69, hybrid=0.7, bm25=0.6, minilm=0.75),
    ]
    found = {bar.asked: (bar.found, bar.met) for bar in tables.bars(results)}
    assert list(found.values()) == [
        ("3 of 3", True),
        ("2 of 3", True),
        ("0.763", True),
        ("0.817", True),
        ("three 0.92", False),
    ]
    results[0]["rows"]["ours"] |= {"f1": 0.4, "exact_match": 0.2, "answers": 9}
    results[0]["rows"]["gold"] = {"f1": 0.5, "exact_match": 0.4, "answers": 9}
    assert tables.bars(results)[-1].found == "0.80" and not tables.bars(results)[-1].met
    results[0]["rows"]["hybrid"] |= {"f1": 0.45, "exact_match": 0.2, "answers": 9}
    assert [bar.found for bar in tables.bars(results)[-2:]] == ["0.80", "0.90"]
    page = tables.page(results)
    assert "| one | 1,500 | 12 | 345 | .450 / .900 / .900 |" in page
    assert "| mean | | | | .382 / .763 / .763 |" in page
    assert "| one | 9 | .200 / .400 | .200 / .450 | .400 / .500 |" in page
    assert page.count("**missed**") == 2


def test_a_session_trains_and_measures_every_seed_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tiny_settings(tmp_path)
    out = tmp_path / "out"
    options = ["--data", str(settings.data), "--out", str(out), "--device", "cpu"]
    options += ["--config", str(tmp_path / "config.toml"), "--set", "steps=2"]
    options += ["--model", settings.base, "--banks", str(harbour(tmp_path))]
    options += ["--rows", "ours,gold", "--answers", "2"]
    assert session.main([*options, "--stop-after", "0"]) == session.EXIT_MORE
    assert session.main(options) == 0
    headers = [read_adapter(out / f"seed-{seed}.safetensors").header for seed in (1, 2)]
    assert [header.training.seed for header in headers] == [1, 2]
    page = (out / "tables.md").read_text()
    assert "## Seed 1" in page and "## Seed 2" in page and "apart" in page
    (kept,) = (out / "seed-1").rglob("*.json")
    before = kept.read_text()
    assert json.loads(before)["rows"]["gold"]["answers"] == 2
    assert session.main(options) == 0 and kept.read_text() == before
    assert session.main([*options, "--banks", "none"]) == 2
    assert "BankError" in capsys.readouterr().err
