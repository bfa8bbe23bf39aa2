"""A client's command starts without the server's libraries."""

from __future__ import annotations

import subprocess
import sys

import pytest

SHOW = """
import sys
from memsvc.cli.main import build
build({command!r})
print(*sorted({{"sqlalchemy", "lmdb", "memsvc.server"}} & set(sys.modules)))
"""


@pytest.mark.parametrize(
    ("command", "loaded"),
    [("memory", ""), ("model", ""), ("serve", "lmdb memsvc.server sqlalchemy")],
)
def test_what_a_command_loads(command: str, loaded: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SHOW.format(command=command)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == loaded
