"""python -m model_adapter.conformance ADDRESS --data-dir DIR: checks a running worker.

Prints a line per check. Exit status 0 when all passed, 1 when one failed, 2 when nothing
answers at ADDRESS. Without --data-dir only what needs no stored memory is checked, the
rest is skipped and the status is 3.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import sys
from pathlib import Path

from grpc import aio

from model_adapter.conformance.harness import connected
from model_adapter.conformance.report import ContractError, Result
from model_adapter.conformance.suite import run
from storage.paths import DataFolder

PASSED, FAILED, UNREACHABLE, SKIPPED = 0, 1, 2, 3


def parser() -> argparse.ArgumentParser:
    """What the command takes."""
    made = argparse.ArgumentParser(prog="python -m model_adapter.conformance", description=__doc__)
    made.add_argument("address", help="of the worker: unix:PATH or host:port")
    made.add_argument("--data-dir", type=Path, help="the data folder that the worker reads")
    made.add_argument(
        "--tolerance", type=float, default=0.02, help="relative error between equal blocks"
    )
    made.add_argument("--only", default="", help="checks whose name begins so")
    made.add_argument("--json", action="store_true", help="one JSON object per check")
    return made


async def _run(options: argparse.Namespace) -> list[Result]:
    results: list[Result] = []
    data = DataFolder(options.data_dir) if options.data_dir else None
    async with connected(options.address, data, options.tolerance) as harness:
        async for result in run(harness, options.only):
            line = json.dumps(dataclasses.asdict(result)) if options.json else result.line
            sys.stdout.write(line + "\n")
            sys.stdout.flush()
            results.append(result)
    return results


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = parser().parse_args(arguments)
    try:
        results = asyncio.run(_run(options))
    except ContractError as error:
        sys.stdout.write(f"failed  info: {error}\n")
        return FAILED
    except aio.AioRpcError as error:
        sys.stderr.write(f"nothing answers at {options.address}: {error.code().name}\n")
        return UNREACHABLE
    outcomes = {result.outcome for result in results}
    if "failed" in outcomes or not results:
        return FAILED
    return SKIPPED if "skipped" in outcomes else PASSED


if __name__ == "__main__":
    sys.exit(main())
