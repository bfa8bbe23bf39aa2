"""Kills processes, or cuts the power, while clients write, delete, ask, fork and move memories.

    python -m tests.fault.crash_loop --kills 200
        [--target server|worker|both|points|database|disk|host|all]
        [--database sqlite|postgres] [--engine fake] [--seed N] [--json]

    server    kill -9 of the server at random moments, also while it starts
    worker    kill -9 of the supervised worker, and drains of the server
    both      either, at random
    points    the server dies at each failpoint of storage/failpoints.py in turn
    database  kill -9 of every process of PostgreSQL, mid-transaction
    disk      the server's system calls fail now and then (EIO, ENOSPC), then kill -9
    host      power cuts: an ext4 disk is shut down without flushing its log, and mounted again
    all       all but host, in turn, each round in a fresh folder (tests/fault/rounds.py)

Writers append turns without pause, several to a memory, and repeat an append with its
request_id until it is acknowledged; some are given up instead, and may then be there
once or not at all. Beside them documents are deleted, questions asked, and whole
memories made, exported, imported and deleted; and memories are forked, now and as of
the past, and the forks forked, appended to, deleted from, taken back to an earlier
revision and deleted. At intervals and at the end every acknowledged turn must be there
exactly once and in order unless it was deleted, in each fork as well that was made after
it; nothing that was deleted may be readable; a fork that nobody was told of is whole or
not there; `check` must be clean, and each memory must answer from all its documents.

Each of these verifications prints a line. A run that is stopped (SIGTERM, Ctrl-C) prints
what it had verified until then and ends with 75.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import tempfile
from pathlib import Path

from tests.fault.figures import CannotTryError, CrashLoopError, Figures
from tests.fault.loop import TARGETS, Options, Verified, crash_loop
from tests.fault.rounds import run_rounds

ALL = "all"
#: Exit status where the machine cannot do what was asked for.
SKIPPED = 77
#: Exit status of a run that was stopped; what it printed was verified.
STOPPED = 75


def tell(figures: Figures) -> None:
    """A line of progress."""
    sys.stderr.write(
        f"{figures.kills} kills, {figures.turns_acked} turns acknowledged, "
        f"{figures.turns_stored} stored, {figures.deletions_acked} deletions, "
        f"{figures.answers} answers, {figures.seconds:g} s: all sound\n"
    )
    sys.stderr.flush()


async def whole_run(options: Options, folder: Path, verified: Verified) -> list[str]:
    """Every round that the options ask for. Returns what was skipped, and why.

    Raises CannotTryError when all was, CrashLoopError.
    """
    if options.target == ALL:
        return await run_rounds(options, folder, verified)
    await crash_loop(options, folder, verified)
    return []


def main(arguments: list[str] | None = None) -> int:
    """0 when nothing was lost; 1 with the problems on stderr; 75 when it was stopped; 77 when
    nothing could be tried."""
    parser = argparse.ArgumentParser(prog="python -m tests.fault.crash_loop")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--target", choices=(*TARGETS, ALL), default="server")
    parser.add_argument("--database", choices=("sqlite", "postgres"), default="")
    parser.add_argument("--engine", default="fake", help="model of the worker")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = vars(parser.parse_args(arguments))
    as_json = given.pop("json")
    sound, status = Figures(), 0

    def verified(figures: Figures) -> None:
        nonlocal sound
        sound = figures
        tell(figures)

    with tempfile.TemporaryDirectory(prefix="memsvc-crash-") as folder:
        try:
            skipped = asyncio.run(_stoppable(Options(**given), Path(folder), verified))
        except CannotTryError as error:
            sys.stderr.write(f"SKIPPED: {error}\n")
            return SKIPPED
        except CrashLoopError as error:
            sys.stderr.write(f"{error}\n")
            status, skipped = 1, []
    if skipped is None:
        status, skipped = STOPPED, []
    for why in skipped:
        sys.stderr.write(f"SKIPPED: {why}\n")
    told = given | {"complete": status == 0, "skipped": skipped} | sound.shown()
    if as_json:
        sys.stdout.write(json.dumps(told) + "\n")
    else:
        for name, value in told.items():
            sys.stdout.write(f"{name:22} {value}\n")
    return status


async def _stoppable(options: Options, folder: Path, verified: Verified) -> list[str] | None:
    """As whole_run; None when a signal stopped it. All processes are ended then, too."""
    run = asyncio.create_task(whole_run(options, folder, verified))
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, run.cancel)
    try:
        return await run
    except asyncio.CancelledError:
        return None


if __name__ == "__main__":
    sys.exit(main())
