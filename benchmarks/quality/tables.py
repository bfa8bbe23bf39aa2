"""Results of several banks as one table, and which bars they meet.

    python -m benchmarks.quality.tables RESULT.json ..

A result is what `python -m benchmarks.quality --json` printed for one bank.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.quality.evaluate import BM25, GOLD, HYBRID, MINILM, OURS

#: The banks that routing is judged by.
BANKS = (
    "squad_v11_dev",
    "nq",
    "popqa",
    "2wikimultihopqa",
    "musique",
    "hotpotqa",
    "locomo_turns",
    "locomo_sessions",
    "realtalk_turns",
)
ROWS = (OURS, HYBRID, BM25, MINILM)
CUTOFFS = ("recall@1", "recall@5", "recall@10")
#: Bars: mean recall@5 by routing alone and with words; least share of the better other row on
#: any bank; F1 of routed text as a share of F1 with the gold documents.
ALONE, WITH_WORDS, LEAST_SHARE, F1_SHARE = 0.76, 0.79, 0.95, 0.85

Result = dict[str, Any]


@dataclass(frozen=True)
class Bar:
    """What was asked for, what was found, and whether that is enough."""

    asked: str
    found: str
    met: bool


def _value(result: Result, row: str, figure: str) -> float | None:
    value = result["rows"].get(row, {}).get(figure)
    return None if value is None else float(value)


def _mean(results: Sequence[Result], row: str, figure: str) -> float | None:
    values = [value for r in results if (value := _value(r, row, figure)) is not None]
    return fmean(values) if values and len(values) == len(results) else None


def table(results: Sequence[Result]) -> str:
    """Recall@1 / 5 / 10 of every row by bank, and their means, in Markdown."""
    rows = [row for row in ROWS if any(row in result["rows"] for result in results)]
    lines = [
        "| bank | questions | documents | tokens | " + " | ".join(rows) + " |",
        "| --- " * (len(rows) + 4) + "|",
    ]
    for result in results:
        facts = [result["bank"], *(f"{result[key]:,}" for key in ("questions", "documents"))]
        cells = [_recalls([_value(result, row, cut) for cut in CUTOFFS]) for row in rows]
        lines.append("| " + " | ".join([*facts, f"{result['tokens']:,}", *cells]) + " |")
    means = [_recalls([_mean(results, row, cut) for cut in CUTOFFS]) for row in rows]
    lines.append("| mean | | | | " + " | ".join(means) + " |")
    return "\n".join(lines)


def _recalls(values: Sequence[float | None]) -> str:
    if None in values:
        return ""
    return " / ".join(f"{value:.3f}".removeprefix("0") for value in values)


def answers(results: Sequence[Result]) -> str:
    """Exact match and F1 where questions were answered; empty where none were."""
    asked = [r for r in results if any(row.get("answers") for row in r["rows"].values())]
    if not asked:
        return ""
    rows = [row for row in (*ROWS, GOLD) if any(_value(r, row, "f1") is not None for r in asked)]
    lines = [
        "| bank | answers | " + " | ".join(f"{row} EM / F1" for row in rows) + " |",
        "| --- " * (len(rows) + 2) + "|",
    ]
    for result in asked:
        cells = [
            _recalls([_value(result, row, figure) for figure in ("exact_match", "f1")])
            for row in rows
        ]
        count = max(row.get("answers", 0) for row in result["rows"].values())
        lines.append(f"| {result['bank']} | {count} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def bars(results: Sequence[Result]) -> list[Bar]:
    """Those that the results say something about."""
    found: list[Bar] = []
    for other in (BM25, MINILM):
        pairs = _pairs(results, other)
        above = sum(ours > theirs for _, ours, theirs in pairs)
        asked = f"recall@5 by routing alone above {other} on all banks but one"
        if pairs:
            found.append(Bar(asked, f"{above} of {len(pairs)}", above >= len(pairs) - 1))
    for row, least in ((OURS, ALONE), (HYBRID, WITH_WORDS)):
        mean = _mean(results, row, "recall@5")
        if mean is not None:
            asked = f"mean recall@5 of {row} at least {least}"
            found.append(Bar(asked, f"{mean:.3f}", mean >= least))
    shares = _shares(results)
    if shares:
        low = [f"{bank} {share:.2f}" for bank, share in shares if share < LEAST_SHARE]
        asked = f"no bank below {LEAST_SHARE} of the better one of {BM25} and {MINILM}"
        found.append(Bar(asked, ", ".join(low) or "none", not low))
    return [*found, *_f1_bars(results)]


def _f1_bars(results: Sequence[Result]) -> list[Bar]:
    found: list[Bar] = []
    for row in (OURS, HYBRID):
        pairs = [
            (r["bank"], routed, gold)
            for r in results
            if (routed := _value(r, row, "f1")) is not None
            and (gold := _value(r, GOLD, "f1")) is not None
        ]
        if pairs:
            of_gold = max(sum(gold for *_, gold in pairs), 1e-9)
            share = sum(routed for _, routed, _ in pairs) / of_gold
            asked = f"F1 with what {row} ranks at least {F1_SHARE} of F1 with the gold documents"
            found.append(Bar(asked, f"{share:.2f}", share >= F1_SHARE))
    return found


def _pairs(results: Sequence[Result], other: str) -> list[tuple[str, float, float]]:
    """(bank, ours, the other) of the banks that have both."""
    return [
        (r["bank"], ours, theirs)
        for r in results
        if (ours := _value(r, OURS, "recall@5")) is not None
        and (theirs := _value(r, other, "recall@5")) is not None
    ]


def _shares(results: Sequence[Result]) -> list[tuple[str, float]]:
    best: dict[str, tuple[float, float]] = {}
    for other in (BM25, MINILM):
        for bank, ours, theirs in _pairs(results, other):
            best[bank] = ours, max(theirs, best.get(bank, (0.0, 0.0))[1])
    return [(bank, ours / theirs) for bank, (ours, theirs) in best.items() if theirs]


def page(results: Sequence[Result]) -> str:
    """Tables and bars, in Markdown."""
    lines = [table(results), ""]
    if answered := answers(results):
        lines += [answered, ""]
    lines += ["| bar | found | |", "| --- | --- | --- |"]
    verdicts = ((bar, "met" if bar.met else "**missed**") for bar in bars(results))
    lines += [f"| {bar.asked} | {bar.found} | {verdict} |" for bar, verdict in verdicts]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Prints the tables of result files."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.tables")
    parser.add_argument("results", nargs="+", type=Path)
    print(page([json.loads(path.read_text()) for path in parser.parse_args(argv).results]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
