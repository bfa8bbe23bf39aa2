from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memsvc import names
from memsvc.api_error import ApiError
from memsvc.v1.errors_pb2 import ErrorReason

ids = st.from_regex(names.RESOURCE_ID, fullmatch=True)
numbers = st.integers(1, names.MAX_NUMBER)


@given(ids, numbers)
def test_names_round_trip(memory_id: str, number: int) -> None:
    assert names.parse_memory("name", names.memory_name(memory_id)) == memory_id
    document = names.document_name(memory_id, number)
    assert names.parse_document("name", document) == (memory_id, number)
    assert names.parse_tenant("name", names.tenant_name(memory_id)) == memory_id
    key = names.api_key_name(memory_id, "0123456789abcdef")
    assert names.parse_api_key("name", key) == (memory_id, "0123456789abcdef")


@given(st.text())
def test_any_text_is_parsed_or_refused_by_field(text: str) -> None:
    parsers: list[Callable[[str, str], object]] = [
        names.parse_memory,
        names.parse_document,
        names.parse_model,
        names.parse_tenant,
        names.parse_api_key,
    ]
    for parse in parsers:
        with pytest.raises(ApiError) as caught:
            parse("some.field", text)
        assert caught.value.field == "some.field"


@pytest.mark.parametrize(
    "name",
    [
        "memories/",
        "memories/abc",
        "memories/Abcd",
        "memories/abcd/",
        "memories/abcd/documents/1",
        "memories/-abc",
        "memories/abcd-",
        "memories/abcd\n",
        "memories//abcd",
        "/memories/abcd",
        "memories/../abcd",
        "memories/äbcd",
        "memories/" + "a" * 64,
        "memory/abcd",
    ],
)
def test_malformed_memory_names(name: str) -> None:
    with pytest.raises(ApiError) as caught:
        names.parse_memory("name", name)
    assert caught.value.reason == ErrorReason.FIELD_INVALID


@pytest.mark.parametrize("number", ["0", "01", "-1", "+1", "1.0", "١", "9223372036854775808", ""])
def test_malformed_document_numbers(number: str) -> None:
    with pytest.raises(ApiError) as caught:
        names.parse_document("name", f"memories/abcd/documents/{number}")
    assert caught.value.reason == ErrorReason.FIELD_INVALID


def test_empty_names_are_missing() -> None:
    with pytest.raises(ApiError) as caught:
        names.parse_memory("name", "")
    assert caught.value.reason == ErrorReason.FIELD_REQUIRED


def test_made_ids_are_valid_and_differ() -> None:
    made = {names.new_memory_id() for _ in range(100)}
    assert len(made) == 100
    assert all(names.RESOURCE_ID.fullmatch(memory_id) for memory_id in made)
