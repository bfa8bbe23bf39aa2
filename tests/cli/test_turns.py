"""Turns from lines."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memsvc.cli.turns import (
    Defaults,
    Form,
    TurnsError,
    parse_turns,
)
from memsvc.client import Role, Turn
from memsvc.client.batching import BATCH_BYTES, BATCH_TURNS, batches

PLAIN = Defaults()


def test_plain_lines_take_the_defaults() -> None:
    defaults = Defaults(Role.TOOL, "Ada", "s1")
    turns = parse_turns(["one\n", "\n", "  two  \n"], Form.AUTO, defaults)
    assert turns == [
        Turn(Role.TOOL, "one", speaker="Ada", session="s1"),
        Turn(Role.TOOL, "two", speaker="Ada", session="s1"),
    ]


def test_json_lines_carry_every_field() -> None:
    line = {
        "role": "assistant",
        "text": " spaces stay ",
        "occurred_at": "2026-03-01T18:30:00Z",
        "speaker": "Jun",
        "session": "a",
        "metadata": {"k": "v"},
    }
    (turn,) = parse_turns([json.dumps(line)], Form.AUTO, PLAIN)
    moment = datetime(2026, 3, 1, 18, 30, tzinfo=UTC)
    assert turn == Turn(Role.ASSISTANT, " spaces stay ", moment, "Jun", "a", {"k": "v"})


def test_the_first_line_decides_and_a_format_can_be_forced() -> None:
    assert parse_turns(["hi", '{"text": "x"}'], Form.AUTO, PLAIN)[1].text == '{"text": "x"}'
    assert parse_turns(['{"text": "x"}'], Form.TEXT, PLAIN)[0].text == '{"text": "x"}'
    with pytest.raises(TurnsError, match="line 1"):
        parse_turns(["hi"], Form.JSONL, PLAIN)


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ('{"text": ""}', "text"),
        ('{"role": "user"}', "text"),
        ('{"text": 3}', "text"),
        ('{"text": "x", "role": "narrator"}', "narrator"),
        ('{"text": "x", "rôle": "user"}', "unknown field"),
        ('{"text": "x", "occurred_at": "yesterday"}', "yesterday"),
        ('{"text": "x", "metadata": {"a": 1}}', "metadata"),
        ('{"text": "x"', "JSON"),
        ("[1]", "object"),
    ],
)
def test_a_bad_line_is_named(line: str, word: str) -> None:
    with pytest.raises(TurnsError, match=f"line 3:.*{word}"):
        parse_turns(['{"text": "ok"}', "", line], Form.JSONL, PLAIN)


@given(st.lists(st.text(max_size=30)))
def test_any_lines_parse_or_raise_the_typed_error(lines: list[str]) -> None:
    try:
        turns = parse_turns(lines, Form.AUTO, PLAIN)
    except TurnsError:
        return
    assert len(turns) == sum(1 for line in lines if line.strip())


@given(st.lists(st.integers(1, BATCH_BYTES + 100), max_size=12))
def test_batches_keep_order_and_limits(sizes: list[int]) -> None:
    turns = [Turn("user", "x" * size) for size in sizes]
    made = list(batches(turns))
    assert [turn for batch in made for turn in batch] == turns
    for batch in made:
        assert len(batch) == 1 or sum(len(turn.text) for turn in batch) <= BATCH_BYTES


def test_batches_hold_so_many_turns() -> None:
    made = list(batches([Turn("user", "x")] * (BATCH_TURNS + 1)))
    assert [len(batch) for batch in made] == [BATCH_TURNS, 1]
