"""A whole session on a lent GPU in one command: train, evaluate all banks, train again with
another seed, evaluate that, and say how far the two are apart.

    python -m benchmarks.quality.session --data DIR --out DIR --seeds 1,2 --device cuda

Interrupted, or stopped by --stop-after, the same command goes on where it was: training at its
newest checkpoint, evaluation at the next bank. OUT then holds `seed-N.safetensors`, a result per
bank in `seed-N/`, and `tables.md`. Exit status 3: there is more to do.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean

from benchmarks.quality import __main__ as quality
from benchmarks.quality import tables
from benchmarks.quality.banks import BankError
from benchmarks.quality.evaluate import DEFAULT_ROWS, OURS
from benchmarks.quality.rankers import MissingPackageError
from model_adapter.engines import UnusableModelError

EXIT_MORE = 3
CONFIG = Path("model_adapter/training/configs/smollm2-gpu.toml")


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.session")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--seeds", default="1,2")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", default="default", help="the base, if it is another one")
    parser.add_argument("--data-dir", type=Path, default=Path(".data"), help="where models are")
    parser.add_argument("--banks", default=",".join(tables.BANKS))
    parser.add_argument("--rows", default=",".join(DEFAULT_ROWS))
    parser.add_argument("--limit", type=int, default=0)
    parser.add_argument("--characters", type=int, default=0)
    parser.add_argument("--answers", type=int, default=200)
    parser.add_argument("--stop-after", type=float, default=float("inf"), metavar="SECONDS")
    return parser.parse_args(argv)


class Session:
    """The steps of one command line, each done once."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._end = time.monotonic() + arguments.stop_after
        self._seeds = [int(seed) for seed in arguments.seeds.split(",")]
        self._banks = arguments.banks.split(",")

    def run(self) -> int:
        """0 when everything is there; the exit status of a training that ended otherwise."""
        self._arguments.out.mkdir(parents=True, exist_ok=True)
        for seed in self._seeds:
            if status := self._train(seed):
                return status
            for bank in self._banks:
                if time.monotonic() > self._end:
                    return EXIT_MORE
                self._evaluate(seed, bank)
            self._write()
        return 0

    def _adapter(self, seed: int) -> Path:
        return Path(self._arguments.out / f"seed-{seed}.safetensors")

    def _train(self, seed: int) -> int:
        """The trainer's exit status: in a process of its own, whose memory is then free."""
        done = self._arguments.out / f"seed-{seed}.trained"
        if done.is_file():
            return 0
        left = self._end - time.monotonic()
        if left <= 0:
            return EXIT_MORE
        command = [sys.executable, "-m", "model_adapter.training"]
        command += ["--config", str(self._arguments.config), "--adapter", str(self._adapter(seed))]
        run = self._arguments.out / f"run-{seed}"
        values = [f"data={self._arguments.data}", f"run={run}", f"seed={seed}"]
        for value in (*values, f"device={self._arguments.device}", *self._arguments.set):
            command += ["--set", value]
        if left != float("inf"):
            command += ["--stop-after", str(left)]
        status = subprocess.run(command, check=False).returncode
        if status == 0:
            done.touch()
        return status

    def _result(self, seed: int, bank: str) -> Path:
        return Path(self._arguments.out / f"seed-{seed}" / f"{Path(bank).name}.json")

    def _evaluate(self, seed: int, bank: str) -> None:
        a, path = self._arguments, self._result(seed, bank)
        if path.is_file():
            return
        options = ["--bank", bank, "--data", a.data, "--adapter", self._adapter(seed)]
        options += ["--device", a.device, "--model", a.model, "--data-dir", a.data_dir]
        options += ["--limit", a.limit, "--characters", a.characters, "--answers", a.answers]
        options += ["--rows", a.rows, "--cache", a.out / "cache"]
        result = quality.run(quality.parse([str(option) for option in options]))
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(result))
        partial.replace(path)

    def _write(self) -> None:
        """tables.md of the seeds that are evaluated."""
        lines: list[str] = []
        means: dict[int, float] = {}
        for seed in self._seeds:
            paths = [self._result(seed, bank) for bank in self._banks]
            if all(path.is_file() for path in paths):
                results = [json.loads(path.read_text()) for path in paths]
                lines += [f"## Seed {seed}", "", tables.page(results)]
                means[seed] = fmean(r["rows"][OURS]["recall@5"] for r in results)
        if len(means) > 1:
            told = ", ".join(f"{mean:.4f} of seed {seed}" for seed, mean in means.items())
            apart = max(means.values()) - min(means.values())
            lines.append(f"Mean recall@5 by routing alone: {told}; {apart:.4f} apart.\n")
        (self._arguments.out / "tables.md").write_text("\n".join(lines))


def main(argv: list[str] | None = None) -> int:
    """0 when all is done, 3 when the same command has more to do, 2 with a message."""
    try:
        return Session(_arguments(argv)).run()
    except (BankError, MissingPackageError, UnusableModelError) as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
