"""docs/cli.md names every command and every exit code, and nothing that is not there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import typer

from memsvc.cli.exits import ExitCode
from memsvc.cli.main import build

PAGE = (Path(__file__).parents[2] / "docs/cli.md").read_text()


def commands(group: typer.Typer, prefix: str) -> Iterator[str]:
    for registered in group.registered_commands:
        yield f"{prefix} {registered.name}"
    for nested in group.registered_groups:
        if nested.typer_instance is not None:
            yield from commands(nested.typer_instance, f"{prefix} {nested.name}")


def test_every_command_is_documented() -> None:
    documented = re.findall(r"^\| `(memsvc [a-z -]+)` \|", PAGE, re.MULTILINE)
    assert sorted(documented) == sorted(commands(build(), "memsvc"))


def test_every_exit_code_is_documented() -> None:
    documented = re.findall(r"^\| (\d+) \| ([A-Z_]+) \|", PAGE, re.MULTILINE)
    assert documented == [(str(code.value), code.name) for code in ExitCode]
