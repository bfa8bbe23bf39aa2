"""The key tree: every document its own key, and a destroyed one cannot be computed again."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.crypto.key_tree import ROOT_HEIGHT, KeyTree
from storage.store import CorruptRecordError, KeyMissingError

SECRET = bytes(range(32))
NUMBERS = st.integers(0, 2**ROOT_HEIGHT - 1) | st.integers(0, 40)
NONCE = bytes(12)


def mark(tree: KeyTree, number: int) -> bytes:
    """Tells keys apart without looking at them."""
    return tree.cipher(number).encrypt(NONCE, b"", b"")


def test_the_same_secret_gives_the_same_keys_in_any_order() -> None:
    one, other = KeyTree.grown_from(SECRET), KeyTree.grown_from(SECRET)
    numbers = [*range(100), 2**40, 2**62, 2**63 - 1]
    found = {n: mark(one, n) for n in numbers}
    assert {n: mark(other, n) for n in reversed(numbers)} == found
    assert {n: mark(one, n) for n in numbers} == found, "asked again"
    assert len(set(found.values())) == len(numbers)
    assert mark(KeyTree.grown_from(bytes(32)), 5) != found[5]


def test_the_derivation_is_what_was_written_with() -> None:
    """A change of these bytes makes every stored record unreadable."""
    tree = KeyTree.grown_from(SECRET)
    assert mark(tree, 1).hex() == "e49c4a0e29b997b80ec640177ee29092"
    assert tree.encode().hex() == "3f" + "00" * 8 + SECRET.hex()


@given(st.sets(NUMBERS, max_size=6), st.sets(NUMBERS, max_size=20))
@settings(max_examples=60, deadline=None)
def test_destroyed_keys_are_gone_and_all_others_stay(gone: set[int], others: set[int]) -> None:
    whole = KeyTree.grown_from(SECRET)
    tree = whole.without(gone)
    for number in gone:
        assert not tree.holds(number)
        with pytest.raises(KeyMissingError):
            tree.cipher(number)
    for number in (others | {n ^ 1 for n in gone}) - gone:
        assert tree.holds(number)
        assert mark(tree, number) == mark(whole, number)
    assert all(whole.holds(number) for number in gone), "a tree is never changed"


@given(st.lists(st.sets(st.integers(0, 63), max_size=8), max_size=5))
@settings(max_examples=40, deadline=None)
def test_destroying_step_by_step_is_destroying_at_once(steps: list[set[int]]) -> None:
    tree = KeyTree.grown_from(SECRET)
    for step in steps:
        tree = KeyTree.decode(tree.without(step).encode())
    assert tree.encode() == KeyTree.grown_from(SECRET).without(set().union(*steps)).encode()


def test_nothing_left_gives_the_destroyed_key_back() -> None:
    """No node that is kept lies above the number, so no hash of what is kept leads to it."""
    tree = KeyTree.grown_from(SECRET).without([7, 9, 2**50])
    data = tree.encode()
    nodes = [
        (data[i], int.from_bytes(data[i + 1 : i + 9], "little")) for i in range(0, len(data), 41)
    ]
    for number in (7, 9, 2**50):
        assert not [node for node in nodes if number >> node[0] == node[1]]


def test_a_number_that_was_destroyed_gets_another_key() -> None:
    whole = KeyTree.grown_from(SECRET)
    tree = whole.without([4, 5]).with_new([4, 6])
    assert mark(tree, 4) != mark(whole, 4)
    assert mark(tree, 6) == mark(whole, 6)
    assert not tree.holds(5)
    assert mark(KeyTree.decode(tree.encode()), 4) == mark(tree, 4)


def test_a_long_scan_keeps_little() -> None:
    tree = KeyTree.grown_from(SECRET)
    first = mark(tree, 0)
    for number in range(20_000):
        tree.cipher(number)
    assert len(tree._derived) < 10_000
    assert mark(tree, 0) == first


@pytest.mark.parametrize(
    "data", [b"x", bytes(40), bytes(42), b"\x40" + bytes(40), b"\x3f\x01" + bytes(39)]
)
def test_broken_nodes_are_refused(data: bytes) -> None:
    with pytest.raises(CorruptRecordError):
        KeyTree.decode(data)
