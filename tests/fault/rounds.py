"""Crash loops of all kinds in turn: what `--target all` runs.

Each round is a run of its own in a fresh folder, with a seed that follows from the run's,
so that a round that fails can be repeated alone: it says its target, kills and seed.
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace
from functools import partial
from itertools import count, cycle
from pathlib import Path

from tests.fault.figures import CannotTryError, CrashLoopError, Figures
from tests.fault.loop import Options, Verified, crash_loop

#: Kills of a round, by target. `points` comes by each of its points once or twice.
ROUND = {"points": 60, "server": 50, "both": 40, "database": 25, "worker": 15, "disk": 10}


async def run_rounds(options: Options, folder: Path, verified: Verified) -> list[str]:
    """Runs all targets in turn until there were as many kills as asked for.

    verified: told of all rounds so far together. A target that cannot be tried here leaves its
    kills to the others. Returns what was skipped, and why. Raises CannotTryError when all was,
    CrashLoopError.
    """
    done, skipped, numbers = Figures(), dict[str, str](), count(1)
    for target, kills in cycle(ROUND.items()):
        if done.kills >= options.kills or len(skipped) == len(ROUND):
            break
        if target in skipped:
            continue
        number = next(numbers)
        one = replace(
            options,
            target=target,
            kills=min(kills, options.kills - done.kills),
            seed=options.seed + number - 1,
        )
        command = f"--target {one.target} --kills {one.kills} --seed {one.seed}"
        sys.stderr.write(f"{command}\n")
        home = await asyncio.to_thread(_home, folder, number)
        try:
            done.add(await crash_loop(one, home, partial(_add, done.copy(), verified)))
        except CannotTryError as error:
            skipped[target] = f"{target}: {error}"
        except CrashLoopError as error:
            raise CrashLoopError(f"{command}\n{error}") from error
    if not done.kills:
        raise CannotTryError("; ".join(skipped.values()))
    return list(skipped.values())


def _home(folder: Path, number: int) -> Path:
    # A database that runs as another user must get at its files.
    folder.chmod(0o755)
    home = folder / f"round-{number}"
    home.mkdir(mode=0o755)
    return home


def _add(before: Figures, verified: Verified, figures: Figures) -> None:
    """Tells of one round together with those before it."""
    together = before.copy()
    together.add(figures)
    verified(together)
