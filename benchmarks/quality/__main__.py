"""Recall and answers of a bank, beside BM25, MiniLM and the gold documents.

    python -m benchmarks.quality --bank locomo_turns --limit 100 --answers 20 --json

What the rows and figures mean, and how to make a bank: docs/quality.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine
from benchmarks.quality import banks, sampling
from benchmarks.quality.evaluate import DEFAULT_ROWS, ROWS, Evaluation, Figures, Plan
from benchmarks.quality.rankers import MissingPackageError
from benchmarks.quality.through_grpc import WEIGHTS, measure
from model_adapter.engines import UnusableModelError, choose_device, load_engine
from storage.paths import DataFolder

COLUMNS = (
    "recall@1",
    "recall@5",
    "recall@10",
    "exact_match",
    "f1",
    "contains",
    "declines",
    "cites_gold",
)


def report(bank: banks.Bank, figures: Figures, through: str) -> dict[str, Any]:
    """One JSON object."""
    rows = {row: tally.figures() for row, tally in figures.rows.items()}
    return {
        "bank": bank.name,
        "documents": figures.documents,
        "documents_refused": figures.refused,
        "tokens": figures.tokens,
        "scopes": len(bank.scopes),
        "questions": len(bank.questions),
        "model": asdict(figures.model),
        "through": through,
        "machine": {**machine(), "threads": torch.get_num_threads()},
        "bytes_per_token": round(figures.block_bytes / max(figures.tokens, 1), 1),
        "encode_ms_per_token": round(figures.encode_seconds * 1000 / max(figures.tokens, 1), 4),
        "rows": rows,
    }


def table(result: dict[str, Any]) -> str:
    """The rows for reading."""
    head = f"{result['bank']}: {result['questions']} questions, {result['documents']} documents"
    lines = [head, "", "| | " + " | ".join(COLUMNS) + " |", "| --- " * (len(COLUMNS) + 1) + "|"]
    for row, figures in result["rows"].items():
        cells = ["" if figures[c] is None else f"{figures[c]:.3f}" for c in COLUMNS]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality")
    parser.add_argument("--bank", required=True, help="a name in --data, a folder, a path prefix")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--model", default="default", help="default, a directory, a .gguf file")
    parser.add_argument("--adapter", default="auto", help="a file, none, or auto: the model's own")
    parser.add_argument("--data-dir", type=Path, default=Path(".data"), help="where models are")
    parser.add_argument("--cache", type=Path, default=Path(".data/quality"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument(
        "--through",
        choices=("engine", "grpc"),
        default="engine",
        help="grpc: a whole service, which has the rows ours and hybrid alone",
    )
    parser.add_argument("--rows", default=",".join(DEFAULT_ROWS), help="of " + ", ".join(ROWS))
    parser.add_argument("--limit", type=int, default=0, help="questions, drawn; 0 for all")
    parser.add_argument("--scopes", type=int, default=0, help="the first N conversations")
    parser.add_argument(
        "--characters", type=int, default=0, help="of the corpus, drawn; 0 for all of it"
    )
    parser.add_argument("--left-out", default="", help="conversations that take no part: A,B")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-dates", action="store_true", help="leave occurred_at out")
    parser.add_argument("--answers", type=int, default=0, help="questions to answer")
    parser.add_argument("--documents", type=int, default=0, help="put in; 0: as the model does")
    parser.add_argument("--answer-tokens", type=int, default=24)
    parser.add_argument(
        "--batch", type=int, default=0, help="questions answered together; 0: by the device"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")
    arguments = parser.parse_args(argv)
    unknown = set(arguments.rows.split(",")) - set(ROWS)
    if unknown:
        parser.error(f"--rows: {', '.join(sorted(unknown))} is none of {', '.join(ROWS)}")
    if arguments.through == "grpc" and not WEIGHTS.keys() & set(arguments.rows.split(",")):
        parser.error(f"--through grpc has the rows {' and '.join(WEIGHTS)}, none was asked for")
    return arguments


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Raises BankError, MissingPackageError, UnusableModelError."""
    rows = arguments.rows.split(",")
    plan = Plan(
        tuple(row for row in rows if row in WEIGHTS or arguments.through == "engine"),
        arguments.answers,
        arguments.documents,
        arguments.answer_tokens,
        arguments.batch,
        arguments.seed,
    )
    if arguments.through == "engine":
        plan.check()
    bank = banks.read(
        arguments.bank,
        arguments.data,
        scopes=arguments.scopes,
        dates=not arguments.no_dates,
    )
    bank = sampling.draw(
        bank,
        questions=arguments.limit,
        characters=arguments.characters,
        seed=arguments.seed,
        left_out=[name for name in arguments.left_out.split(",") if name],
    )
    if arguments.through == "grpc":
        figures = through_service(bank, plan, arguments.model, arguments.adapter)
    else:
        device, data = choose_device(arguments.device), DataFolder(arguments.data_dir)
        engine = load_engine(arguments.model, data, device, arguments.dtype, arguments.adapter)
        figures = Evaluation(engine, bank, plan, arguments.cache).run()
    drawn = {name: getattr(arguments, name) for name in ("seed", "limit", "characters", "left_out")}
    return report(bank, figures, arguments.through) | {"drawn": drawn}


def through_service(bank: banks.Bank, plan: Plan, model: str, adapter: str) -> Figures:
    """On a data folder that is gone afterwards."""
    if adapter not in ("auto", "none"):
        adapter = str(Path(adapter).absolute())
    with tempfile.TemporaryDirectory() as folder:
        return measure(bank, plan, model, Path(folder) / "data", f"worker_adapter={adapter}")


def main(argv: list[str] | None = None) -> int:
    """Prints a table, or one JSON object; 2 with a message for what cannot be run."""
    arguments = parse(argv)
    try:
        result = run(arguments)
    except (banks.BankError, MissingPackageError, UnusableModelError) as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 2
    print(json.dumps(result) if arguments.json else table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
