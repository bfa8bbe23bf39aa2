"""What README and examples/ show works as it stands there."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.live import LiveServer, environment, live_server

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "examples/quickstart.py"
#: Around the client example in README.md.
MARKED = re.compile(r"<!-- quickstart -->\s*```python\n(.*?)```\s*<!-- /quickstart -->", re.DOTALL)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with live_server(tmp_path_factory.mktemp("readme") / "data") as made:
        yield made


def run(server: LiveServer, code: str) -> str:
    values = {"MEMSVC_ADDRESS": server.address, "MEMSVC_API_KEY": server.api_key}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment() | values,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    with server.client() as client:
        client.memories.delete("anna", allow_missing=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def shown_in_readme() -> str:
    readme = ROOT / "README.md"
    found = MARKED.findall(readme.read_text()) if readme.exists() else []
    assert len(found) == 1, "README.md shows the example once, between its markers"
    return str(found[0])


def test_the_readme_example_runs(server: LiveServer) -> None:
    assert "Lisbon" in run(server, shown_in_readme())


def test_the_quickstart_runs(server: LiveServer) -> None:
    assert "Lisbon" in run(server, QUICKSTART.read_text())


def test_the_readme_shows_the_quickstart() -> None:
    _, body = QUICKSTART.read_text().split("\n\n", 1)
    assert ast.dump(ast.parse(shown_in_readme())) == ast.dump(ast.parse(body))
