"""Takes processor time like a server that works for somebody else, for benchmarks.overload.

    python -m benchmarks.burning --cores 0.2 --per-second 40 --seconds 20

Works in bursts that come at random moments, `cores` of a core in all. Prints one JSON object:
how much of a core it used.
"""

from __future__ import annotations

import argparse
import json
import random
import time


def burn(cores: float, per_second: float, seconds: float) -> float:
    """Works for so long, and returns the cores that were used.

    Each burst ends when it has had its processor time, however long it was kept from it.
    """
    chance = random.Random(0)
    burst_s = cores / per_second
    started, end, due = time.thread_time(), time.monotonic() + seconds, time.monotonic()
    while True:
        due += chance.expovariate(per_second)
        if due >= end:
            break
        time.sleep(max(0.0, due - time.monotonic()))
        stop = time.thread_time() + burst_s
        while time.thread_time() < stop:
            pass
    return (time.thread_time() - started) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cores", type=float, required=True)
    parser.add_argument("--per-second", type=float, required=True, help="bursts")
    parser.add_argument("--seconds", type=float, required=True)
    arguments = parser.parse_args()
    used = burn(arguments.cores, arguments.per_second, arguments.seconds)
    print(json.dumps({"cores": round(used, 2)}))


if __name__ == "__main__":
    main()
