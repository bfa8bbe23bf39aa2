"""The judge of the crash loop knows what a fork must hold."""

from __future__ import annotations

import pytest

from tests.fault.family import Branch, Family, Fork, Root
from tests.fault.ledger import Ledger, Stored, problems

FIRST, SECOND, OPEN, THIRD = (f"w n{n} remembers" for n in range(4))


def names(memory: str, *numbers: int) -> list[str]:
    return [f"memories/{memory}/documents/{number}" for number in numbers]


def wrong(branch: Branch, **texts: str) -> list[str]:
    """Problems when these texts are stored, given as n1=..., n2=... by number."""
    stored = []
    for key, text in texts.items():
        number = int(key.removeprefix("n"))
        stored.append(Stored(names(branch.memory, number)[0], number, text))
    return problems(branch.ledgers(), stored)


@pytest.fixture
def family() -> Family:
    """Two turns, acknowledged with revisions 1 and 2, and one under way."""
    writer = Ledger("m", "w")
    for number in (1, 2):
        writer.acknowledge(writer.send(1), names("m", number), number)
    writer.send(1)
    return Family(Root("m", [writer]))


def forked(family: Family, revision: int, parent: Branch | None = None) -> Fork:
    fork = family.begin(parent or family.root)
    fork.made(revision)
    family.forks.append(fork)
    return fork


def test_a_fork_holds_what_was_acknowledged_until_then(family: Family) -> None:
    fork, past = forked(family, 2), forked(family, 1)
    assert (fork.memory, past.memory) == ("m-f1", "m-f2")
    writer = family.root.writers[0]
    writer.acknowledge(writer.send(1), names("m", 4), 4)
    # What was under way may be in it, until its revision is known.
    assert wrong(fork, n1=FIRST, n2=SECOND) == wrong(fork, n1=FIRST, n2=SECOND, n3=OPEN) == []
    assert wrong(past, n1=FIRST) == []
    writer.acknowledge([OPEN], names("m", 3), 5)
    cases: dict[str, list[str]] = {
        "lost": wrong(fork, n1=FIRST),
        f"never sent: {OPEN}": wrong(fork, n1=FIRST, n2=SECOND, n3=OPEN),
        f"never sent: {THIRD}": wrong(fork, n1=FIRST, n2=SECOND, n4=THIRD),
        f"never sent: {SECOND}": wrong(past, n1=FIRST, n2=SECOND),
        "moved": wrong(fork, n1=FIRST, n3=SECOND),
        "doubled": wrong(fork, n1=FIRST, n2=SECOND, n3=SECOND),
        "out of order": wrong(fork, n1=SECOND, n2=FIRST),
    }
    for words, found in cases.items():
        assert any(words in problem for problem in found), (words, found)


def test_what_was_deleted_before_is_not_in_it_and_what_is_later_stays(family: Family) -> None:
    writer = family.root.writers[0]
    writer.deleted[FIRST] = True
    fork = family.begin(family.root)
    writer.deleted[SECOND] = False
    fork.made(2)
    writer.deleted[SECOND] = True
    # The second one's deletion came beside the fork: either way.
    assert wrong(fork) == wrong(fork, n2=SECOND) == []
    assert "still there" in wrong(fork, n1=FIRST)[0]
    assert fork.deletable() == {}
    writer.deleted.clear()
    later = forked(family, 2)
    writer.deleted[FIRST] = True
    assert wrong(later, n1=FIRST, n2=SECOND) == []
    assert "lost" in wrong(later, n2=SECOND)[0]


def test_a_fork_goes_its_own_way(family: Family) -> None:
    fork = forked(family, 2)
    own = fork.own.send(2)
    fork.own.acknowledge(own[:1], names("m-f1", 3), 3)
    fork.own.acknowledge(own[1:], names("m-f1", 4), 4)
    child = forked(family, 3, fork)
    assert fork.past() == [2, 3, 4] and child.past() == [3]
    assert fork.added_after(3) == {own[1]: "memories/m-f1/documents/4"}
    assert fork.deletable()[FIRST] == "memories/m-f1/documents/1"
    for text in (FIRST, own[0]):
        fork.delete(text, done=True)
    assert wrong(fork, n2=SECOND, n4=own[1]) == []
    assert len(wrong(fork, n1=FIRST, n2=SECOND, n3=own[0], n4=own[1])) == 2
    assert wrong(child, n1=FIRST, n2=SECOND, n3=own[0]) == []
    assert wrong(family.root, n1=FIRST, n2=SECOND) == []
    assert "never sent" in wrong(family.root, n1=FIRST, n2=SECOND, n3=own[0])[0]


def test_a_fork_of_which_nobody_was_told_is_whole_or_absent(family: Family) -> None:
    there, absent = family.begin(family.root), family.begin(family.root)
    family.doubtful += [there, absent]
    family.settle({"m": 0, there.memory: 2})
    assert family.branches() == [family.root, there] and not family.doubtful
    assert wrong(there, n1=FIRST, n2=SECOND) == []
    assert forked(family, 0).past() == []
    assert "lost" in wrong(there, n1=FIRST)[0]
