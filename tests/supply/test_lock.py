"""The lock file, what pyproject.toml asks for, and what is installed say the same."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
#: Named by the lock through scripts/setup and the Dockerfile, which take it from another index;
#: what it brings along depends on the build (CPU or GPU), so its needs are not followed.
TORCH = "torch"


def locked() -> dict[str, str]:
    pins: dict[str, str] = {}
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        name, exactly, version = line.partition("==")
        assert exactly and re.fullmatch(r"[\w.!+-]+", version), f"not an exact pin: {line}"
        assert canonicalize_name(name) not in pins, f"pinned twice: {name}"
        pins[canonicalize_name(name)] = version
    return pins


def asked() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"]
    lines = [*PROJECT["dependencies"], *extras["dev"]]
    return [Requirement(line) for line in lines]


def needs(name: str, extras: frozenset[str]) -> Iterator[Requirement]:
    """What an installed distribution needs on this machine, with these extras of it."""
    for line in metadata.requires(name) or ():
        need = Requirement(line)
        if need.marker is None or any(need.marker.evaluate({"extra": e}) for e in {"", *extras}):
            yield need


def test_every_requirement_is_locked_within_its_bounds() -> None:
    pins = locked()
    for requirement in asked():
        pin = pins.get(canonicalize_name(requirement.name))
        assert pin, f"{requirement.name} is not locked"
        assert requirement.specifier.contains(pin), f"{requirement} is locked at {pin}"


@pytest.mark.parametrize(("name", "version"), sorted(locked().items()))
def test_what_is_installed_is_what_is_locked(name: str, version: str) -> None:
    # A CPU build of torch calls itself 2.13.0+cpu.
    assert metadata.version(name).partition("+")[0] == version


def test_everything_that_a_locked_package_needs_is_locked() -> None:
    """So that installing from the lock never resolves anything anew."""
    pins = locked()
    waiting = [(canonicalize_name(r.name), frozenset(r.extras)) for r in asked()]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        found = waiting.pop()
        if found in seen or found[0] == TORCH:
            continue
        seen.add(found)
        for need in needs(*found):
            name = canonicalize_name(need.name)
            assert name in pins, f"{found[0]} needs {need}, which is not locked"
            assert need.specifier.contains(pins[name], prereleases=True), f"{found[0]}: {need}"
            waiting.append((name, frozenset(need.extras)))
    assert len(seen) > 50


def test_the_parts_that_install_it_use_the_lock() -> None:
    """One version of torch everywhere, and the lock in every installation."""
    torch = next(str(r.specifier) for r in asked() if r.name == TORCH)
    for file in ("scripts/setup", "docker/Dockerfile"):
        text = (ROOT / file).read_text()
        assert f"torch{torch}" in text, file
        assert "requirements.lock" in text, file
    assert f"torch{torch}" in (ROOT / "requirements.lock").read_text()
