"""Readers of outside formats under damaged input: a declared error or a sound value.

A slice of `python -m tests.fuzz.readers`, and hypothesis, which shrinks what it finds.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.formats import Target, targets
from tests.fuzz.readers import DefectError, main, run

NAMES = (
    "records",
    "records, encrypted",
    "records, sealed",
    "archive",
    "archive, under a passphrase",
    "archive, sealed",
    "archive tensors",
    "dump, chatgpt",
    "dump, claude",
    "dump, letta",
    "dump, mem0",
    "safetensors",
    "gguf",
)


@pytest.fixture(scope="module")
def known() -> Iterator[dict[str, Target]]:
    with targets() as made:
        yield made


def test_these_are_the_targets(known: dict[str, Target]) -> None:
    assert tuple(known) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_slice(known: dict[str, Target], name: str) -> None:
    figures = run(known[name], 150 if known[name].slow else 2000, seed=1)
    assert figures["accepted"] < figures["inputs"]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_edits(known: dict[str, Target], name: str, data: st.DataObject) -> None:
    content = bytearray(data.draw(st.sampled_from(known[name].seeds)))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content)))
        length = data.draw(st.integers(0, 16))
        content[at : at + length] = data.draw(st.binary(max_size=16))
    known[name].read(bytes(content))


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_bytes_from_nowhere(known: dict[str, Target], content: bytes) -> None:
    for target in known.values():
        target.read(content)


def test_a_defect_is_told_with_its_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def read(data: bytes) -> bool:
        if data != b"sound":
            raise IndexError("undeclared")
        return True

    with pytest.raises(DefectError, match=r"fuzz-defect-x-y\.bin"):
        run(Target("x, y", [b"sound"], read), 50, seed=1)
    assert (tmp_path / "fuzz-defect-x-y.bin").read_bytes() != b"sound"


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--inputs", "40", "--target", "records", "--json"]) == 0
    assert '"inputs": 40' in capsys.readouterr().out
