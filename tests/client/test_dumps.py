"""Dumps of other services: what becomes of them, and how a bad one is refused."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from memsvc.client import ConfigurationError, ImportFormatError, TextSource, Turn
from memsvc.client.batching import BATCH_TURNS, conversation_batches
from memsvc.client.dumps import Dump, read_dump
from memsvc.client.mapping import known, load
from tests.support.dumps import CHATGPT, CLAUDE, DUMPS, LETTA, LETTA_OLD, MEM0, encoded


def read(name: str, dump: object) -> Dump:
    return read_dump(encoded(dump), load(name))


def told(dump: Dump) -> list[tuple[str, str]]:
    return [(turn.role, turn.text) for turns in dump.conversations for turn in turns]


def test_these_are_known() -> None:
    assert known() == sorted(DUMPS)


def test_chatgpt() -> None:
    dump = read("chatgpt", CHATGPT)
    assert told(dump) == [("user", "Who repairs boilers?"), ("assistant", "Olga does.")]
    (turns,) = dump.conversations
    assert turns[1] == Turn(
        "assistant",
        "Olga does.",
        occurred_at=datetime(2024, 3, 9, 16, 1, tzinfo=UTC),
        session="c-1",
        metadata={"source": "chatgpt", "title": "Boilers"},
    )


def test_claude() -> None:
    dump = read("claude", CLAUDE)
    assert told(dump) == [
        ("user", "Where do herons nest?\n\nNotes on herons."),
        ("assistant", "In trees,\n\nnear water."),
    ]
    assert dump.conversations[0][0].occurred_at == datetime(2025, 3, 1, 10, 0, 1, tzinfo=UTC)
    older = copy.deepcopy(CLAUDE)
    for message in older[0]["chat_messages"]:
        del message["content"]
    assert told(read("claude", older))[1] == ("assistant", "In trees.")


def test_letta() -> None:
    dump = read("letta", LETTA)
    assert told(dump) == [("user", "The roses are by the wall."), ("assistant", "Noted.")]
    assert dump.texts == (TextSource("Grows roses.", title="human", metadata={"source": "letta"}),)
    assert dump.conversations[0][0].metadata == {"source": "letta", "agent": "gardener"}
    older = read("letta", LETTA_OLD)
    assert told(older) == [("user", "Hello there")] and older.texts[0].text == "I keep notes."


@pytest.mark.parametrize("form", [MEM0, {"memories": MEM0["results"]}, MEM0["results"]])
def test_mem0(form: object) -> None:
    dump = read("mem0", form)
    assert [text.text for text in dump.texts] == ["Likes tea without sugar", "Lives in Graz"]
    assert dump.texts[0].metadata == {
        "source": "mem0",
        "mem0_id": "m-1",
        "user": "ann",
        "categories": "food, habits",
    }
    assert dump.texts[0].occurred_at == datetime(2025, 1, 2, 11, 4, 5, tzinfo=UTC)
    assert dump.texts[1].occurred_at is None


def change(name: str, edit: Callable[[Any], object]) -> object:
    dump = copy.deepcopy(DUMPS[name])
    return dump if (made := edit(dump)) is None else made


def put(*path: object, value: object) -> Callable[[Any], None]:
    def edit(dump: Any) -> None:
        *above, last = path
        for step in above:
            dump = dump[step]
        dump[last] = value

    return edit


MESSAGE = (0, "chat_messages", 1)
NODES = (0, "mapping")


@pytest.mark.parametrize(
    ("name", "edit", "place"),
    [
        ("claude", put(*MESSAGE, "sender", value="robot"), "[0].chat_messages[1].sender"),
        ("claude", put(*MESSAGE, "sender", value=None), "[0].chat_messages[1]"),
        ("claude", put(*MESSAGE, "sender", value=7), "[0].chat_messages[1].sender"),
        ("claude", put(*MESSAGE, "created_at", value="soon"), "[0].chat_messages[1].created_at"),
        ("claude", put(*MESSAGE, "created_at", value=True), "[0].chat_messages[1].created_at"),
        ("claude", put(*MESSAGE, "created_at", value=1e300), "[0].chat_messages[1].created_at"),
        ("claude", put(*MESSAGE, value="hm"), "[0].chat_messages[1]"),
        ("claude", put(0, "chat_messages", value={}), "[0].chat_messages"),
        ("claude", put(0, value=[]), "[0]"),
        ("chatgpt", put(0, "current_node", value="gone"), "[0].current_node"),
        ("chatgpt", put(0, "current_node", value=["ask"]), "[0].current_node"),
        ("chatgpt", put(*NODES, "ask", "parent", value="nobody"), "[0].mapping.ask.parent"),
        ("chatgpt", put(*NODES, "root", "parent", value="ask"), "[0].mapping.root.parent"),
        ("chatgpt", put(*NODES, "ask", value=[]), "[0].mapping.ask"),
        ("chatgpt", put(1, value={"current_node": "ask"}), "[1]"),
        ("letta", put("agents", 0, "messages", 1, "role", value="bird"), "agents[0].messages[1]"),
        ("letta", put("blocks", 0, "value", value=[1]), "blocks[0].value"),
        ("mem0", put("results", 1, "memory", value=5), "results[1].memory"),
        ("mem0", put("results", value="all"), "results"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(
    name: str, edit: Callable[[Any], object], place: str
) -> None:
    with pytest.raises(ImportFormatError) as caught:
        read(name, change(name, edit))
    assert caught.value.place.startswith(place)
    assert str(caught.value).startswith(place)


@pytest.mark.parametrize(
    ("data", "place"),
    [
        (b"", "line 1, column 1"),
        (b'[{"a":\n1,}]', "line 2, column 3"),
        (b"\xff\xfe", "byte 0"),
        (b"[" * 100_000, ""),
        (b"1" * 10_000, ""),
        (b"null", "the file"),
        (b"[]", "the file"),
        (b"{}", "the file"),
        (b'"text"', "the file"),
    ],
)
@pytest.mark.parametrize("name", sorted(DUMPS))
def test_files_that_are_no_dump(data: bytes, place: str, name: str) -> None:
    with pytest.raises(ImportFormatError) as caught:
        read_dump(data, load(name))
    assert caught.value.place == place


def test_a_dump_of_another_service_is_not_taken_for_one() -> None:
    with pytest.raises(ImportFormatError, match="no dump of letta"):
        read("letta", MEM0)
    with pytest.raises(ImportFormatError):
        read("mem0", LETTA)


def test_what_the_api_refuses_is_made_fit() -> None:
    long = "ä" * 200_000
    dump = read(
        "mem0",
        [
            {"memory": "bell \x07 and half \ud800", "id": "x" * 5000},
            {"memory": long * 4, "id": "long"},
        ],
    )
    assert dump.texts[0].text == "bell \ufffd and half \ufffd"
    assert len(dump.texts[0].metadata["mem0_id"]) == 1024
    assert "".join(text.text for text in dump.texts[1:]) == long * 4
    assert all(len(text.text.encode()) <= 2**20 for text in dump.texts)
    message = {"sender": "human", "text": long}
    turns = read("claude", [{"uuid": "u" * 200, "chat_messages": [message]}]).conversations[0]
    assert [len(turn.text.encode()) for turn in turns] == [262_144, 400_000 - 262_144]
    assert {turn.session for turn in turns} == {"u" * 128}


def test_conversations_are_not_parted_where_that_can_be() -> None:
    chance = random.Random(2)
    talks = [
        tuple(Turn("user", f"{n} {i}", session=str(n)) for i in range(chance.randint(1, 150)))
        for n in range(20)
    ] + [tuple(Turn("user", str(i), session="long") for i in range(BATCH_TURNS * 2 + 3))]
    made = list(conversation_batches(talks))
    assert [turn for batch in made for turn in batch] == [turn for talk in talks for turn in talk]
    assert all(len(batch) <= BATCH_TURNS for batch in made)
    for number in range(20):
        assert sum(any(turn.session == str(number) for turn in batch) for batch in made) == 1


def test_ids_are_of_content_mapping_and_memory() -> None:
    first, again, other = read("mem0", MEM0), read("mem0", MEM0), read("letta", LETTA)
    assert first.id == again.id != other.id
    ids = {first.request_id("m", 0), first.request_id("m", 1), first.request_id("n", 0)}
    assert len(ids) == 3 and all(len(one) <= 64 for one in ids)


def test_a_mapping_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "diary.toml"
    path.write_text('[[texts]]\neach = "days[].notes[]"\ntext = "body"\ntitle = "day"\n')
    data = json.dumps({"days": [{"notes": [{"body": "rain", "day": "Monday"}]}]}).encode()
    assert read_dump(data, load(str(path))).texts == (TextSource("rain", title="Monday"),)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no toml",
        "[[texts]]\n",
        '[[texts]]\neach = 1\ntext = "a"\n',
        '[[texts]]\neach = ""\ntext = ["a", 1]\n',
        '[[texts]]\neach = ""\ntext = "a"\nmore = 1\n',
        '[[conversations]]\neach = ""\ntext = "a"\nrole = "r"\nroles = {}\n',
        '[[conversations]]\neach = ""\nmessages = "m[]"\ntext = "a"\nrole = "r"\n'
        'roles = { x = "bird" }\n',
        '[[conversations]]\neach = ""\ntext = "a"\nrole = "r"\nroles = {}\ntree = { a = 1 }\n',
        'unknown = 1\n[[texts]]\neach = ""\ntext = "a"\n',
    ],
)
def test_mappings_that_cannot_be_used(text: str, tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text(text)
    with pytest.raises(ConfigurationError):
        load(str(path))


def test_names_that_are_no_mapping(tmp_path: Path) -> None:
    for name in ("none", "../claude", str(tmp_path / "none.toml")):
        with pytest.raises(ConfigurationError):
            load(name)
