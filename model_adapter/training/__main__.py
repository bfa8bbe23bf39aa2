"""`python -m model_adapter.training --config FILE` trains, or continues a run."""

from __future__ import annotations

import argparse
import logging
import math
import sys
from pathlib import Path

from model_adapter.checkpoints import CheckpointError
from model_adapter.training import run as runs
from model_adapter.training.errors import SettingsError, TrainingError
from model_adapter.training.settings import read_settings

EXIT_STOPPED = 3


def parser() -> argparse.ArgumentParser:
    """What the command takes."""
    made = argparse.ArgumentParser(prog="python -m model_adapter.training", description=__doc__)
    made.add_argument("--config", required=True, type=Path, help="a TOML file")
    made.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="instead of the file's"
    )
    made.add_argument(
        "--export", type=Path, help="write the newest checkpoint as an adapter file, and end"
    )
    made.add_argument(
        "--stop-after", type=float, default=math.inf, metavar="SECONDS", help="of training"
    )
    made.add_argument("--evaluate", action="store_true", help="measure held-out recall, and end")
    made.add_argument("--adapter", type=Path, help="where each checkpoint's adapter goes")
    return made


def main(argv: list[str] | None = None) -> int:
    """0 when done; 3 when --stop-after came first, and the same command continues; 2 with a
    message when something is wrong before work begins."""
    options = parser().parse_args(argv)
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s"
    )
    try:
        overrides = dict(entry.partition("=")[::2] for entry in options.set)
        settings = read_settings(options.config, overrides)
        if options.export:
            step = runs.export(settings, options.export)
            logging.info("wrote %s of step %d", options.export, step)
            return 0
        if options.adapter and not options.adapter.absolute().parent.is_dir():
            raise SettingsError(f"--adapter: no directory {options.adapter.parent}")
        run = runs.prepare(settings)
        journal = runs.Journal(settings.run / "log.jsonl", settings.steps)
        if options.evaluate:
            runs.restore(run)
            journal.write({"held_out": runs.evaluate(run)})
            return 0
        if not runs.train(run, journal, options.stop_after, options.adapter):
            return EXIT_STOPPED
        if options.adapter:
            runs.export(settings, options.adapter)
    except (TrainingError, CheckpointError) as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
