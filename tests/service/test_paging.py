from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memsvc.api_error import ApiError
from memsvc.paging import PageTokens
from memsvc.v1.errors_pb2 import ErrorReason

tokens = PageTokens(b"k" * 32)
BINDING = ("tenant", "ListMemories")
positions = st.lists(st.one_of(st.integers(0, 2**63), st.text(max_size=64)), max_size=3)


@given(st.lists(st.text(max_size=20), max_size=4), positions)
def test_round_trip(binding: list[str], position: list[int | str]) -> None:
    assert tokens.open(binding, tokens.issue(binding, position)) == position


def test_empty_means_from_the_start() -> None:
    assert tokens.open(BINDING, "") is None


@pytest.mark.parametrize(
    "binding",
    [("other", "ListMemories"), ("tenant", "ListDocuments"), ("tenant", "ListMemories", "x"), ()],
)
def test_a_token_is_good_for_its_listing_only(binding: tuple[str, ...]) -> None:
    token = tokens.issue(BINDING, [5, "abc"])
    refused(binding, token)


def test_parts_of_a_binding_do_not_run_together() -> None:
    refused(("ab", "c"), tokens.issue(("a", "bc"), [1]))


def test_another_server_key_refuses() -> None:
    refused(BINDING, PageTokens(b"j" * 32).issue(BINDING, [1]))


@given(st.integers(0, 200), st.characters(codec="ascii"))
def test_altered_tokens_are_refused(place: int, letter: str) -> None:
    token = tokens.issue(BINDING, [123456, "0123456789abcdef"])
    place %= len(token)
    altered = token[:place] + letter + token[place + 1 :]
    if altered != token:
        try:
            opened = tokens.open(BINDING, altered)
        except ApiError as error:
            assert error.reason == ErrorReason.PAGE_TOKEN_INVALID
        else:
            # The last letter's spare bits carry nothing.
            assert opened == [123456, "0123456789abcdef"]


@given(st.text(max_size=2000).filter(bool))
def test_any_text_is_refused(text: str) -> None:
    refused(BINDING, text)


def refused(binding: tuple[str, ...], token: str) -> None:
    with pytest.raises(ApiError) as caught:
        tokens.open(binding, token)
    assert caught.value.reason == ErrorReason.PAGE_TOKEN_INVALID
