"""Sizes of memories on a command line: "4K,16K,1M" tokens."""

from __future__ import annotations

import argparse
import re

_UNITS = {"": 1, "K": 1_000, "M": 1_000_000}


def parse(text: str) -> dict[str, int]:
    """Tokens by name, ascending. Raises argparse.ArgumentTypeError."""
    sizes = {}
    for name in text.split(","):
        match = re.fullmatch(r"([1-9]\d*)([KM]?)", name.strip().upper())
        if match is None:
            raise argparse.ArgumentTypeError(f"{name!r} is no size such as 16K or 1M")
        sizes[match[0]] = int(match[1]) * _UNITS[match[2]]
    return dict(sorted(sizes.items(), key=lambda item: item[1]))
