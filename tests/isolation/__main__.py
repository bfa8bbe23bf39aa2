"""Runs the whole matrix and prints what was tried: `python -m tests.isolation`.

With --timing it also compares how long calls take that name what exists elsewhere with
those that name nothing, for every attack that is denied.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from pathlib import Path

from tests.isolation.matrix import Matrix
from tests.isolation.timing import compare
from tests.isolation.world import METHODS, make_world
from tests.support.served import Folder, make_folder


async def _run(folder: Folder, root: Path, rounds: int) -> int:
    async with make_world(folder, root / "data") as world:
        matrix = Matrix(world)
        for method in METHODS:
            await matrix.run(method)
        report = matrix.report
        print(
            json.dumps(
                {
                    "rpcs": len(METHODS),
                    "fields": len({case[:2] for case in report.cases}),
                    "rpc_field_attacks": len(report.attacks),
                    "cases": sum(report.cases.values()),
                    "calls": report.calls,
                    "failed": len(report.failures),
                }
            )
        )
        for failure in report.failures:
            print(failure, file=sys.stderr)
        if rounds:
            for line in await compare(world, rounds):
                print(json.dumps(line))
    return 1 if report.failures else 0


def main() -> int:
    """Ends with 1 when something told what it should not."""
    parser = argparse.ArgumentParser(prog="python -m tests.isolation", description=__doc__)
    parser.add_argument("--timing", type=int, default=0, metavar="ROUNDS", help="e.g. 500")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        folder = make_folder(Path(root) / "template")
        return asyncio.run(_run(folder, Path(root), options.timing))


if __name__ == "__main__":
    sys.exit(main())
