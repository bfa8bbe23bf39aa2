"""Damages LMDB files, key files and archives bit by bit; nothing may read otherwise than written.

    python -m tests.fault.corruption --flips 10000 [--torn N] [--cuts N] [--seed N] [--json]

Each trial damages one sound copy and has a child process open it as memsvc does, read
everything, check it, and write. The damage must be detected (a typed error, a finding of
`check`, or a number the catalog misses) or harmless (all reads as written: free pages,
unused bytes). A wrong answer, or a child that dies, fails the campaign.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

from tests.fault.subjects import DETECTED, HARMLESS, SUBJECTS

_ROUND_LINES = 500


@dataclass
class Outcomes:
    """What came of the trials. counts: by "subject kind outcome". bad: with how to repeat it."""

    counts: Counter[str] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)
    trials: int = 0
    crashes: int = 0
    seconds: float = 0.0

    @property
    def wrong(self) -> int:
        """Answers other than written."""
        return len(self.bad) - self.crashes


class Child:
    """The reading process, started again when it dies."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def ask(self, subject: str, kind: str, seed: int) -> str | None:
        """The outcome of one trial; None when the process died of it."""
        process = self._process = self._process or subprocess.Popen(
            [sys.executable, "-m", "tests.fault.corruption_child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(f"{subject} {kind} {seed}\n")
        process.stdin.flush()
        process.stdout.readline()  # The damage, for whoever looks at the child alone.
        answer = process.stdout.readline()
        if not answer:
            self.close()
            return None
        outcome: str = json.loads(answer)["outcome"]
        return outcome

    def close(self) -> None:
        """Ends the process."""
        process, self._process = self._process, None
        if process is not None:
            process.communicate()


def campaign(
    flips: int, torn: int, cuts: int, seed: int, subjects: list[str] | None = None
) -> Outcomes:
    """Runs that many trials of each kind, spread over the subjects."""
    outcomes = Outcomes()
    rng = random.Random(seed)
    kinds = ["flip"] * flips + ["torn"] * torn + ["cut"] * cuts
    names = subjects or list(SUBJECTS)
    child = Child()
    started = time.monotonic()
    try:
        for kind in kinds:
            name, trial = names[outcomes.trials % len(names)], rng.getrandbits(48)
            outcomes.trials += 1
            outcome = child.ask(name, kind, trial)
            outcomes.counts[f"{name} {kind} {(outcome or 'crashed').partition(':')[0]}"] += 1
            outcomes.crashes += outcome is None
            if outcome not in (DETECTED, HARMLESS):
                outcomes.bad.append(f"{name} {kind} {trial}: {outcome or 'the process died'}")
            if outcomes.trials % _ROUND_LINES == 0:
                sys.stderr.write(f"{outcomes.trials} trials, {len(outcomes.bad)} bad\n")
    finally:
        child.close()
    outcomes.seconds = round(time.monotonic() - started, 1)
    return outcomes


def main(arguments: list[str] | None = None) -> int:
    """0 when every trial was detected or harmless."""
    parser = argparse.ArgumentParser(prog="python -m tests.fault.corruption")
    parser.add_argument("--flips", type=int, default=10_000)
    parser.add_argument("--torn", type=int, default=1000)
    parser.add_argument("--cuts", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args(arguments)
    outcomes = campaign(given.flips, given.torn, given.cuts, given.seed)
    if given.json:
        sys.stdout.write(json.dumps(vars(outcomes)) + "\n")
    else:
        for name, count in sorted(outcomes.counts.items()):
            sys.stdout.write(f"{name:28} {count}\n")
        sys.stdout.write(f"wrong answers {outcomes.wrong}, crashes {outcomes.crashes}\n")
    for line in outcomes.bad[:20]:
        sys.stderr.write(f"{line}\n")
    return 1 if outcomes.bad else 0


if __name__ == "__main__":
    sys.exit(main())
