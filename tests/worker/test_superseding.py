"""Later statements before earlier ones that are about the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from hypothesis import given
from hypothesis import strategies as st

from model_adapter.engine import RankedDocument
from model_adapter.superseding import CONSIDERED, POOL, LatestFirst, Statement, statement_of
from storage.documents import Conversation, Role, TextSource, Turn
from storage.store import StoredDocument
from tests.support.pages import World, key, text

FIRST = "my favourite restaurant in town is the golden lion"
THEN = "my favourite restaurant in town is now the blue anchor"
OTHER = "the dentist moved our appointment to november"
MORE = "bob plays chess with carla every friday evening"


def ranking(*numbers: int) -> list[RankedDocument]:
    return [RankedDocument(n, 1 / place, ()) for place, n in enumerate(numbers, start=1)]


def arranged(told: Mapping[int, Statement], *numbers: int, limit: int = 99) -> list[int]:
    def statements(asked: Sequence[int]) -> dict[int, Statement]:
        return {n: told[n] for n in asked if n in told}

    found = LatestFirst(statements)(lambda most: ranking(*numbers)[:most], limit)
    return [document.number for document in found]


def test_the_latest_of_what_is_alike_takes_the_first_place() -> None:
    told = {
        1: Statement(FIRST, 10),
        2: Statement(OTHER, 20),
        3: Statement(THEN, 30),
        4: Statement(MORE, 40),
    }
    assert arranged(told, 1, 2, 3, 4) == [3, 1, 2, 4]
    assert arranged(told, 3, 1, 2, 4) == [3, 1, 2, 4], "it is there already"
    assert arranged(told, 2, 1, 4, 3) == [2, 3, 1, 4], "what is unlike keeps its place"
    assert arranged(told, 1, 2, 3, 4, limit=1) == [3]


def test_time_decides_not_the_order_of_appends() -> None:
    told = {1: Statement(FIRST, 50), 2: Statement(OTHER, 20), 3: Statement(THEN, 30)}
    assert arranged(told, 1, 2, 3) == [1, 2, 3]
    assert arranged(told, 3, 2, 1) == [1, 3, 2]
    same = {1: Statement(FIRST, 30), 2: Statement(OTHER, 20), 3: Statement(THEN, 30)}
    assert arranged(same, 1, 2, 3) == [3, 1, 2], "at one time the one appended later"


def test_what_is_far_below_stays_there_and_what_is_gone_is_no_trouble() -> None:
    told = {n: Statement(f"{MORE} {n}" if n % 2 else f"{OTHER} {n}", n) for n in range(2, POOL)}
    told |= {1: Statement(FIRST, 1), 99: Statement(THEN, 99)}
    low = [1, *range(2, CONSIDERED + 1), 99]
    assert arranged(told, *low)[-1] == 99
    assert sorted(arranged(told, 77, 1, 2, 99)) == [1, 2, 77, 99]
    assert arranged({}, 3, 1, 2) == [3, 1, 2]
    assert arranged(told) == []


phrases = st.lists(
    st.sampled_from(["red", "boat", "chess", "town", "now", "lion", ""]), max_size=5
).map(" ".join)


@given(
    st.dictionaries(st.integers(1, 30), st.builds(Statement, phrases, st.integers(0, 5))),
    st.permutations(range(1, 16)),
    st.integers(1, 20),
)
def test_nothing_is_lost_and_nothing_is_added(
    told: dict[int, Statement], numbers: list[int], limit: int
) -> None:
    found = arranged(told, *numbers, limit=limit)
    assert len(found) == min(limit, len(numbers)) == len(set(found))
    everything = arranged(told, *numbers)
    assert sorted(everything) == sorted(numbers) and everything[:limit] == found
    assert everything[CONSIDERED:] == numbers[CONSIDERED:]


def test_a_document_is_said_when_its_last_turn_was() -> None:
    march, april = (datetime(2026, month, 1, tzinfo=UTC) for month in (3, 4))
    turns = [Turn(Role.USER, "a", moment) for moment in (april, march, None)]
    made = StoredDocument(1, 1, 7, Conversation(tuple(turns)))
    assert statement_of(made).said_us == april.timestamp() * 1_000_000
    assert statement_of(StoredDocument(1, 1, 7, TextSource("t"))) == Statement("t", 7)


def test_a_lease_tells_what_its_documents_say() -> None:
    world = World()
    world.write(key(1), [1, 2, 3])
    world.delete(key(1), [2])
    with world.pager.lease(key(1), 3, 0) as lease:
        found = lease.statements([3, 2, 1, 9])
    assert found.keys() == {1, 3} and text(3) in found[3].text
    assert found[1].said_us == found[3].said_us == 1_772_368_200_000_007
