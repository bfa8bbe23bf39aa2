"""Documents as JSON: every one comes back equal, everything else is refused."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.document_json import (
    DocumentFormatError,
    Fields,
    decode_document,
    encode_document,
    load_json,
)
from storage.documents import Conversation, Role, TextSource, Turn
from storage.layout import KVLayout
from storage.layout_json import fingerprint, layout_fields, parse_layout
from storage.store import StoredDocument
from tests.support.blocks import LAYOUTS, SHARED, documents, encoding_id, make_document


@given(documents(st.integers(1, 2**62)))
def test_round_trip(document: StoredDocument) -> None:
    data = encode_document(document)
    assert decode_document(data) == document
    assert encode_document(decode_document(data)) == data
    assert b"\n" not in data


def test_dates_keep_their_instant_and_lose_their_zone() -> None:
    moment = datetime(2026, 5, 1, 12, tzinfo=timezone(timedelta(hours=2)))
    found = decode_document(
        encode_document(StoredDocument(1, 1, 0, TextSource("x", occurred_at=moment)))
    ).source
    assert isinstance(found, TextSource)
    assert found.occurred_at == moment
    assert found.occurred_at == datetime(2026, 5, 1, 10, tzinfo=UTC)


@pytest.mark.parametrize(
    "source",
    [
        TextSource("\udc80"),
        TextSource("x", title="\ud800"),
        TextSource("x", occurred_at=datetime(2026, 1, 1)),
        TextSource("x", metadata={"a": "\ud800"}),
        Conversation(()),
        Conversation((Turn(Role.USER, "\ud800"),)),
    ],
)
def test_what_cannot_be_written_is_refused(source: Conversation | TextSource) -> None:
    with pytest.raises(ValueError):
        encode_document(StoredDocument(1, 1, 0, source))


def fields() -> dict[str, object]:
    value = json.loads(encode_document(make_document(3)))
    assert isinstance(value, dict)
    return value


def put(path: str, value: object) -> bytes:
    """A sound document's JSON with one place changed; "-" takes it out."""
    whole: object = fields()
    at = whole
    *way, last = path.split(".")
    for step in way:
        at = at[int(step)] if isinstance(at, list) else at[step]  # type: ignore[index]  # JSON.
    assert isinstance(at, dict)
    if value == "-":
        del at[last]
    else:
        at[last] = value
    return json.dumps(whole).encode()


TURN = "conversation.turns.0"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("number", 0),
        ("number", 2**63),
        ("number", True),
        ("number", 1.0),
        ("number", "1"),
        ("number", None),
        ("number", "-"),
        ("revision", -1),
        ("created_at_us", "-"),
        ("more", 1),
        ("text", {}),
        ("conversation", "-"),
        ("conversation", []),
        ("conversation.turns", []),
        ("conversation.turns", {}),
        ("conversation.turns", [1]),
        ("conversation.more", 1),
        (f"{TURN}.role", "root"),
        (f"{TURN}.role", 1),
        (f"{TURN}.text", "-"),
        (f"{TURN}.text", "\ud800"),
        (f"{TURN}.text", None),
        (f"{TURN}.occurred_at_us", 2**62),
        (f"{TURN}.occurred_at_us", "2026"),
        (f"{TURN}.occurred_at_us", "-"),
        (f"{TURN}.metadata", {"a": 1}),
        (f"{TURN}.metadata", {"\ud800": "a"}),
        (f"{TURN}.metadata", []),
        (f"{TURN}.more", 1),
    ],
)
def test_any_other_shape_is_refused(path: str, value: object) -> None:
    decode_document(json.dumps(fields()).encode())
    with pytest.raises(DocumentFormatError):
        decode_document(put(path, value))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"null",
        b"{",
        b"\xff{}",
        b'{"a":1,"a":1}',
        b'{"a":NaN}',
        b'{"a":1e3}',
        b'{"a":' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
    ],
    ids=lambda data: repr(data[:12]),
)
def test_what_is_no_json_of_this_format_is_refused(data: bytes) -> None:
    with pytest.raises(DocumentFormatError):
        decode_document(data)


@settings(max_examples=300)
@given(documents(st.just(3)), st.data())
def test_damaged_text_is_refused_or_another_document(
    document: StoredDocument, data: st.DataObject
) -> None:
    text = encode_document(document)
    at = data.draw(st.integers(0, len(text) - 1))
    patch = data.draw(st.binary(min_size=1, max_size=3))
    try:
        found = decode_document(text[:at] + patch + text[at + len(patch) :])
    except DocumentFormatError:
        return
    assert isinstance(found, StoredDocument)


class TestLayout:
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_round_trip(self, layout: KVLayout) -> None:
        assert parse_layout(Fields(layout_fields(layout), "layout")) == layout

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("dtype", "fp16"),
            ("head_dim", 0),
            ("kv_heads", 2**40),
            ("pool_tokens", -1),
            ("routed_layers", []),
            ("routed_layers", [2, 1]),
            ("routed_layers", [1, 1]),
            ("routed_layers", [-1]),
            ("routed_layers", [True]),
            ("separate_routing_keys", 1),
            ("more", 1),
        ],
    )
    def test_another_shape_is_refused(self, name: str, value: object) -> None:
        changed = layout_fields(SHARED) | {name: value}
        with pytest.raises(DocumentFormatError):
            parse_layout(Fields(changed, "layout"))

    def test_fingerprints_differ(self) -> None:
        marks = {fingerprint(encoding_id(n), layout) for n in (1, 2) for layout in LAYOUTS}
        assert len(marks) == 6
        assert fingerprint(encoding_id(1), SHARED) == fingerprint(encoding_id(1), SHARED)


def test_load_json_reads_plain_json() -> None:
    assert load_json(b'{"a":[1,"b",null,true]}') == {"a": [1, "b", None, True]}
