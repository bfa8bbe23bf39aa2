"""python -m model_adapter.parity DIR: compares every golden file in a directory.

Prints one JSON object: per file whether it passed and the largest difference. Exit
status 0 when all files pass, 1 when one does not, 2 when DIR holds none.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from model_adapter.parity.batch import compare_batch
from model_adapter.parity.comparison import Comparison
from model_adapter.parity.injection import compare_injection
from model_adapter.parity.interleave import compare_interleave
from model_adapter.parity.memory import compare_hidden, compare_memory
from model_adapter.parity.oneshot import compare_oneshot
from model_adapter.parity.source import GoldenError, Source

#: By the start of a file's name; the suffix is that of the file to look for.
ROLES: tuple[tuple[str, str, Callable[[Source, str], Comparison]], ...] = (
    ("memory", ".safetensors", compare_memory),
    ("stage1", ".safetensors", compare_hidden),
    ("oneshot", ".json", compare_oneshot),
    ("batch", ".safetensors", compare_batch),
    ("interleave", ".json", compare_interleave),
    ("injection", ".safetensors", compare_injection),
)


def compare_directory(folder: Path, device: str = "cpu") -> dict[str, dict[str, object]]:
    """Results by file name; a file that cannot be compared is a failed entry."""
    try:
        source = Source(folder, device)
    except GoldenError as error:
        return {"docs.json": {"pass": False, "error": str(error)}}
    results: dict[str, dict[str, object]] = {}
    with torch.inference_mode():
        for start, suffix, compare in ROLES:
            for path in sorted(folder.glob(f"{start}*{suffix}")):
                results[path.name] = _compare(compare, source, path.stem)
    for path in sorted(folder.glob("*.safetensors")):
        if path.name not in results and f"{path.stem}.json" not in results:
            reason = "no json beside it, or a name that says nothing of its content"
            results[path.name] = {"pass": False, "error": reason}
    return results


def _compare(
    compare: Callable[[Source, str], Comparison], source: Source, stem: str
) -> dict[str, object]:
    try:
        return compare(source, stem).report()
    except Exception as error:  # noqa: BLE001 - golden files are input: whatever is wrong with
        # one of them, a wrong type deep inside included, is that file's result
        return {"pass": False, "error": f"{type(error).__name__}: {error}"}


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m model_adapter.parity")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--threads", type=int, default=0, help="of the CPU, 0: torch's own choice")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    given = parser.parse_args(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)
    results = compare_directory(given.directory, given.device)
    passed = sum(bool(result["pass"]) for result in results.values())
    summary = {
        "directory": given.directory.name,
        "pass": bool(results) and passed == len(results),
        "files": len(results),
        "passed": passed,
        "results": results,
    }
    sys.stdout.write(json.dumps(summary, indent=1) + "\n")
    if not results:
        return 2
    return 0 if passed == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
