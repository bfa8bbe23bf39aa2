from __future__ import annotations

import unicodedata
from datetime import UTC, datetime

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given, settings
from hypothesis import strategies as st

from memsvc import convert, validation
from memsvc.api_error import ApiError
from memsvc.v1 import resources_pb2 as pb
from memsvc.v1.errors_pb2 import ErrorReason
from storage.catalog import DocumentRow, PackingMode
from storage.documents import Conversation, text_bytes


def turn(**changes: object) -> pb.Turn:
    values: dict[str, object] = {"role": pb.USER, "text": "hello"}
    return pb.Turn(**{**values, **changes})  # type: ignore[arg-type]  # refused values are the point


@pytest.mark.parametrize(
    ("bad", "reason", "field"),
    [
        (turn(text=""), "FIELD_REQUIRED", "turns[1].text"),
        (turn(role=pb.ROLE_UNSPECIFIED), "FIELD_REQUIRED", "turns[1].role"),
        (turn(role=9), "FIELD_INVALID", "turns[1].role"),
        (turn(text="x" * 262_145), "TEXT_TOO_LONG", "turns[1].text"),
        (turn(text="é" * 131_073), "TEXT_TOO_LONG", "turns[1].text"),
        (turn(text="bell \x07"), "TEXT_NOT_CLEAN", "turns[1].text"),
        (turn(text="nul \x00"), "TEXT_NOT_CLEAN", "turns[1].text"),
        (turn(text="c1 \x85"), "TEXT_NOT_CLEAN", "turns[1].text"),
        (turn(speaker="s" * 129), "TEXT_TOO_LONG", "turns[1].speaker"),
        (turn(session="s" * 129), "TEXT_TOO_LONG", "turns[1].session"),
        (turn(session="\x1b[31m"), "TEXT_NOT_CLEAN", "turns[1].session"),
        (turn(metadata={"Key": "v"}), "FIELD_INVALID", "turns[1].metadata"),
        (turn(metadata={"k": "v" * 1025}), "TEXT_TOO_LONG", "turns[1].metadata"),
        (turn(metadata={f"k{i}": "" for i in range(33)}), "TOO_MANY_ITEMS", "turns[1].metadata"),
        (turn(occurred_at=Timestamp(nanos=-1)), "FIELD_INVALID", "turns[1].occurred_at"),
        (turn(occurred_at=Timestamp(seconds=10**12)), "FIELD_INVALID", "turns[1].occurred_at"),
    ],
)
def test_each_limit_of_a_turn(bad: pb.Turn, reason: str, field: str) -> None:
    with pytest.raises(ApiError) as caught:
        convert.turns_from_wire([turn(), bad])
    assert (ErrorReason.Name(caught.value.reason), caught.value.field) == (reason, field)
    assert "hello" not in caught.value.message


@pytest.mark.parametrize(
    "good",
    [
        turn(text="x" * 262_144),
        turn(text="tab\tline\nreturn\r"),
        turn(text="e\u0301 stays decomposed, \U0001f600 too"),
        turn(text="<|im_start|>system"),
        turn(speaker="s" * 128, session="t" * 128),
        turn(metadata={f"k{i}": "v" * 1024 for i in range(32)}),
    ],
)
def test_what_is_allowed_is_kept_as_it_is(good: pb.Turn) -> None:
    (kept,) = convert.turns_from_wire([good])
    assert (kept.text, kept.speaker, kept.session) == (good.text, good.speaker, good.session)
    assert dict(kept.metadata) == dict(good.metadata)


def test_number_of_turns() -> None:
    with pytest.raises(ApiError) as caught:
        convert.turns_from_wire([])
    assert caught.value.reason == ErrorReason.FIELD_REQUIRED
    with pytest.raises(ApiError) as caught:
        convert.turns_from_wire([turn()] * 1001)
    assert caught.value.metadata == {"limit": "1000", "actual": "1001"}


@given(st.datetimes(datetime(1, 1, 1), datetime(9999, 12, 31, 23, 59, 59), timezones=st.just(UTC)))
def test_times_survive_to_the_microsecond(moment: datetime) -> None:
    wire = Timestamp()
    wire.FromDatetime(moment)
    kept = validation.check_time("t", wire)
    assert kept == moment
    assert convert._datetime_to_wire(kept) == wire


@pytest.mark.parametrize("size", [-1, 1001])
def test_page_size_out_of_range(size: int) -> None:
    with pytest.raises(ApiError) as caught:
        validation.check_page_size(size)
    assert caught.value.field == "page_size"


def test_page_size_zero_is_the_default() -> None:
    assert validation.check_page_size(0) == 50
    assert validation.check_page_size(1000) == 1000


@pytest.mark.parametrize("request_id", ["a b", "x" * 65, "ä", "new\n"])
def test_bad_request_ids(request_id: str) -> None:
    with pytest.raises(ApiError):
        validation.check_request_id(request_id)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 2.1])
def test_numbers_out_of_range(value: float) -> None:
    with pytest.raises(ApiError):
        validation.check_range("options.temperature", value, low=0, high=2)


@pytest.mark.parametrize(
    ("policy", "field"),
    [
        (pb.PackingPolicy(mode=9), "memory.packing.mode"),  # type: ignore[arg-type]  # unknown
        (
            pb.PackingPolicy(mode=pb.PackingPolicy.TURN, window_turns=4),
            "memory.packing.window_turns",
        ),
        (
            pb.PackingPolicy(mode=pb.PackingPolicy.WINDOW, window_turns=65),
            "memory.packing.window_turns",
        ),
        (
            pb.PackingPolicy(mode=pb.PackingPolicy.WINDOW, window_turns=-1),
            "memory.packing.window_turns",
        ),
        (
            pb.PackingPolicy(mode=pb.PackingPolicy.SESSION, max_document_bytes=511),
            "memory.packing.max_document_bytes",
        ),
    ],
)
def test_bad_packing_policies(policy: pb.PackingPolicy, field: str) -> None:
    with pytest.raises(ApiError) as caught:
        convert.packing_from_wire("memory.packing", policy, PackingMode.TURN)
    assert caught.value.field == field


def test_packing_defaults_are_put_in() -> None:
    window = pb.PackingPolicy(mode=pb.PackingPolicy.WINDOW)
    packing = convert.packing_from_wire("p", window, PackingMode.TURN)
    assert (packing.window_turns, packing.max_document_bytes) == (4, 8192)
    unset = convert.packing_from_wire("p", pb.PackingPolicy(), PackingMode.SESSION)
    assert unset.mode is PackingMode.SESSION


turns = st.builds(
    pb.Turn,
    role=st.sampled_from([pb.USER, pb.ASSISTANT, pb.SYSTEM, pb.TOOL]),
    text=st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=200),
    speaker=st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20),
    metadata=st.dictionaries(
        st.from_regex(r"[a-z][a-z0-9_.-]{0,20}", fullmatch=True), st.just("v"), max_size=4
    ),
)


@given(st.lists(turns, min_size=1, max_size=3))
@settings(max_examples=40)
def test_turns_come_back_as_they_were_sent(sent: list[pb.Turn]) -> None:
    kept = Conversation(tuple(convert.turns_from_wire(sent)))
    wire = convert.document_to_wire("memory", DocumentRow(1, 1, 0, text_bytes(kept)), kept)
    assert list(wire.conversation.turns) == sent
    assert wire.text_bytes == sum(len(turn.text.encode()) for turn in sent)


@given(st.text(max_size=50))
def test_clean_is_what_unicode_says(text: str) -> None:
    control = [c for c in text if unicodedata.category(c) == "Cc" and c not in "\t\n\r"]
    if not control:
        validation.check_clean("field", text)
        return
    with pytest.raises(ApiError) as caught:
        validation.check_clean("field", text)
    assert f"U+{ord(control[0]):04X}" in caught.value.message
