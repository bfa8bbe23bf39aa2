"""Fuzzes the readers of records, archives, safetensors and GGUF files.

    python -m tests.fuzz.readers --inputs 1000000 [--target NAME] [--seed N] [--json]

Inputs are sound files with a few edits: bytes flipped, numbers replaced by ones that
lie, pieces cut, doubled or taken from another seed. Targets that take milliseconds an
input get a quarter of the others' share. Prints how many inputs each target took, how
many it accepted, and how fast; the first defect ends the run with the input in a file.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path

from tests.fuzz.formats import Target, targets

_LIES = (0, 1, 2**16, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)
_LARGEST = 1 << 20


class DefectError(AssertionError):
    """A reader did what it must not. The message names the file that shows it."""


def mutated(chance: random.Random, seeds: tuple[bytes, ...]) -> bytes:
    """One to four edits of a seed."""
    data = bytearray(chance.choice(seeds))
    for _ in range(chance.randint(1, 4)):
        # Headers are at the front, and matter most.
        end = min(len(data), 400) if chance.random() < 0.6 else len(data)
        at = chance.randrange(end) if end else 0
        match chance.randrange(7):
            case 0 if data:
                data[at] ^= 1 << chance.randrange(8)
            case 1 if data:
                data[at] = chance.randrange(256)
            case 2:
                lie = chance.choice(_LIES) + chance.randint(-1, 1)
                width = chance.choice((2, 4, 8))
                data[at : at + width] = (lie % 2 ** (8 * width)).to_bytes(width, "little")
            case 3:
                del data[at : at + chance.randint(1, 64)]
            case 4:
                data[at:at] = chance.randbytes(chance.randint(1, 32))
            case 5:
                other = chance.choice(seeds)
                start = chance.randrange(len(other) or 1)
                data[at : at + 32] = other[start : start + chance.randint(1, 64)]
            case 6:
                del data[at:]
    return bytes(data[:_LARGEST])


def run(target: Target, inputs: int, seed: int) -> dict[str, float]:
    """Figures of one target. Raises DefectError."""
    chance = random.Random(f"{seed} {target.name}")
    seeds = tuple(target.seeds)
    for one in seeds:
        if not target.read(one):
            raise DefectError(f"{target.name}: a sound input is refused")
    accepted = 0
    started = time.monotonic()
    for number in range(inputs):
        data = mutated(chance, seeds)
        try:
            accepted += target.read(data)
        except Exception as error:
            shown = Path(f"fuzz-defect-{target.name.replace(', ', '-').replace(' ', '-')}.bin")
            shown.write_bytes(data)
            raise DefectError(f"{target.name}, input {number}: {error!r}; see {shown}") from error
    seconds = time.monotonic() - started
    return {
        "inputs": inputs,
        "accepted": accepted,
        "per_second": round(inputs / max(seconds, 1e-9)),
    }


def weight(target: Target) -> int:
    """Its share of the inputs."""
    return 1 if target.slow else 4


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.readers")
    parser.add_argument("--inputs", type=int, default=100_000, help="over all targets")
    parser.add_argument("--target", action="append", help="one of them; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    with targets() as known:
        chosen = [known[name] for name in options.target or known]
        whole = sum(weight(target) for target in chosen)
        figures = {}
        for target in chosen:
            name, inputs = target.name, -(-options.inputs * weight(target) // whole)
            figures[name] = run(target, inputs, options.seed)
            if not options.json:
                sys.stdout.write(f"{name}: {figures[name]}\n")
    if options.json:
        sys.stdout.write(json.dumps(figures) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
