from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from memsvc.packing import pack, policy
from storage.catalog import PackingMode
from storage.documents import Conversation, Role, Turn

turns = st.lists(
    st.builds(
        Turn,
        role=st.just(Role.USER),
        text=st.text("aé", min_size=1, max_size=400),
        session=st.sampled_from(["", "one", "two"]),
        speaker=st.uuids().map(str),
    ),
    min_size=1,
    max_size=40,
)
policies = st.one_of(
    st.just(policy(PackingMode.TURN)),
    st.builds(policy, st.just(PackingMode.WINDOW), st.integers(2, 8), st.just(512)),
    st.builds(policy, st.just(PackingMode.SESSION), st.just(0), st.integers(512, 2000)),
)


def size(document: Conversation) -> int:
    return sum(len(turn.text.encode()) for turn in document.turns)


@given(turns, policies)
def test_every_turn_is_in_one_document_and_limits_hold(
    given_turns: list[Turn], packing: object
) -> None:
    from storage.catalog import Packing

    assert isinstance(packing, Packing)
    documents = pack(given_turns, packing)
    packed = [turn for document in documents for turn in document.turns]
    assert sorted(map(id, packed)) == sorted(map(id, given_turns))
    positions = {id(turn): index for index, turn in enumerate(given_turns)}
    assert [positions[id(d.turns[0])] for d in documents] == sorted(
        positions[id(d.turns[0])] for d in documents
    )
    for document in documents:
        inside = [positions[id(turn)] for turn in document.turns]
        assert inside == sorted(inside)
        assert len({turn.session for turn in document.turns}) == 1
        if packing.mode is PackingMode.TURN:
            assert len(document.turns) == 1
            continue
        assert len(document.turns) == 1 or size(document) <= packing.max_document_bytes
        if packing.mode is PackingMode.WINDOW:
            assert len(document.turns) <= packing.window_turns


def test_interleaved_sessions_are_kept_apart() -> None:
    spoken = [Turn(Role.USER, text, session=session) for text, session in ("1a", "2b", "3a", "4b")]
    documents = pack(spoken, policy(PackingMode.SESSION))
    assert [[turn.text for turn in d.turns] for d in documents] == [["1", "3"], ["2", "4"]]


def test_windows_are_filled_before_the_next_begins() -> None:
    spoken = [Turn(Role.USER, str(index)) for index in range(7)]
    documents = pack(spoken, policy(PackingMode.WINDOW, window_turns=3))
    assert [len(document.turns) for document in documents] == [3, 3, 1]


def test_a_long_turn_is_a_document_of_its_own() -> None:
    spoken = [Turn(Role.USER, "a"), Turn(Role.USER, "b" * 9000), Turn(Role.USER, "c")]
    documents = pack(spoken, policy(PackingMode.SESSION))
    assert [size(document) for document in documents] == [1, 9000, 1]
