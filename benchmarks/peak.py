"""The most memory that processes ever held."""

from __future__ import annotations

from pathlib import Path

import psutil


def peak_mib(process: int) -> dict[str, float]:
    """Highest resident memory in MiB of a process ("itself") and of all it started ("children").

    Pages of mapped files that were in memory at that time are counted. Linux alone tells it.
    """
    children = psutil.Process(process).children(recursive=True)
    return {"itself": _highest(process), "children": sum(_highest(one.pid) for one in children)}


def _highest(process: int) -> float:
    status = Path(f"/proc/{process}/status").read_text()
    lines = dict(line.split(":", 1) for line in status.splitlines())
    return round(int(lines["VmHWM"].split()[0]) / 1024, 1)
