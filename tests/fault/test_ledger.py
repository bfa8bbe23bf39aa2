"""The judge of the crash loop notices every kind of damage."""

from __future__ import annotations

import pytest

from tests.fault.ledger import Ledger, Stored, problems


def stored(*texts: str) -> list[Stored]:
    return [Stored(f"memories/m/documents/{n}", n, t) for n, t in enumerate(texts, start=1)]


@pytest.fixture
def ledger() -> Ledger:
    """Three turns, of which two are acknowledged."""
    made = Ledger("m", "w0")
    texts = made.send(2)
    made.acknowledge(texts, ["memories/m/documents/1", "memories/m/documents/2"], 1)
    made.send(1)
    return made


def test_sound_with_and_without_the_unacknowledged_turn(ledger: Ledger) -> None:
    first, second, third = ledger.sent
    assert problems([ledger], stored(first, second)) == []
    assert problems([ledger], stored(first, second, third)) == []
    assert ledger.acknowledged == 2


def test_damage_is_named(ledger: Ledger) -> None:
    first, second, third = ledger.sent
    cases = {
        "lost": stored(first),
        "doubled": stored(first, second, third, third),
        "moved": stored("w1 n0 remembers", first, second),
        "out of order": stored(second, first),
        "never sent": stored(first, second, "who wrote this"),
        "do not ascend": [*stored(first, second), *stored(third)],
    }
    for word, documents in cases.items():
        assert any(word in problem for problem in problems([ledger], documents)), word


def test_what_was_deleted_must_be_gone_and_nothing_else(ledger: Ledger) -> None:
    first, second, _ = ledger.sent
    ledger.deleted[first] = False
    assert ledger.deletable() == [second] and ledger.gone() == set()
    assert problems([ledger], stored(first, second)) == []
    assert problems([ledger], stored(first, second)[1:]) == []
    ledger.deleted[first] = True
    assert ledger.gone() == {"memories/m/documents/1"}
    assert problems([ledger], stored(first, second)[1:]) == []
    assert "still there" in problems([ledger], stored(first, second))[0]
    assert "lost" in problems([ledger], [])[0]


def test_a_revision_that_goes_back_is_refused(ledger: Ledger) -> None:
    with pytest.raises(AssertionError, match="revision"):
        ledger.acknowledge(ledger.send(1), ["memories/m/documents/9"], 1)
