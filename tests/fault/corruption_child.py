"""The process that reads damaged files, and that a campaign must not lose.

Each line it is sent names a subject, a kind of damage and a seed; it answers with the
damage before it looks, and with the outcome after.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.fault.subjects import SUBJECTS, Subject

_PAGE = 4096
_SECTOR = 512
_HEADER_BYTES = 64


@dataclass(frozen=True)
class Damage:
    """What is done to a file: bytes put at an offset, and its new length."""

    offset: int
    data: bytes
    length: int

    def apply(self, sound: bytes) -> bytes:
        """The damaged file."""
        damaged = bytearray(sound)
        damaged[self.offset : self.offset + len(self.data)] = self.data
        return bytes(damaged[: self.length])


def choose(sound: bytes, kind: str, rng: random.Random) -> Damage:
    """kind: flip (one bit; half of them near the start of a page, where structure lies),
    torn (some sectors of a page keep an older page's or no content), cut (the file ends early).
    """
    size = len(sound)
    if kind == "flip":
        offset = rng.randrange(size)
        if rng.random() < 0.5:
            offset = min(size - 1, offset // _PAGE * _PAGE + rng.randrange(_HEADER_BYTES))
        return Damage(offset, bytes([sound[offset] ^ 1 << rng.randrange(8)]), size)
    if kind == "cut":
        return Damage(0, b"", rng.randrange(size))
    start = rng.randrange(size) // _SECTOR * _SECTOR
    count = _SECTOR * rng.randint(1, _PAGE // _SECTOR)
    other = rng.randrange(size) // _PAGE * _PAGE + start % _PAGE
    old = bytes(count) if rng.random() < 0.5 else sound[other : other + count]
    return Damage(start, old[: size - start], size)


class _Bench:
    """One subject's sound files, copied for each trial."""

    def __init__(self, subject: Subject, folder: Path) -> None:
        self._subject = subject
        self._sound = folder / "sound"
        self._trial = folder / "trial"
        self._sound.mkdir(parents=True)
        file = subject.make(self._sound)
        self._data = file.read_bytes()
        self._file = self._trial / file.relative_to(self._sound)

    def choose(self, kind: str, seed: int) -> Damage:
        return choose(self._data, kind, random.Random(seed))

    def run(self, damage: Damage) -> str:
        shutil.rmtree(self._trial, ignore_errors=True)
        shutil.copytree(self._sound, self._trial)
        self._file.write_bytes(damage.apply(self._data))
        return self._subject.judge(self._trial)


def main() -> None:
    """Answers lines until its input ends."""
    with tempfile.TemporaryDirectory(prefix="memsvc-corruption-") as folder:
        benches: dict[str, _Bench] = {}
        for line in sys.stdin:
            name, kind, seed = line.split()
            if name not in benches:
                benches[name] = _Bench(SUBJECTS[name], Path(folder) / name)
            damage = benches[name].choose(kind, int(seed))
            _say({"offset": damage.offset, "bytes": len(damage.data), "length": damage.length})
            _say({"outcome": benches[name].run(damage)})


def _say(answer: dict[str, object]) -> None:
    os.write(1, json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    main()
