"""The full-text index, the budget that indexes share, and the blend of two rankings."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model_adapter.blending import DEPTH, blend
from model_adapter.indexes import Indexes
from model_adapter.lexical import MAX_WORDS, LexicalIndex
from model_adapter.residency import HeldMemory, RoutingTable
from tests.support.blocks import SEPARATE
from tests.support.pages import key

BOATS = {
    1: "Anna bought a red sailing boat in Kiel last spring",
    2: "Bob plays chess with Carla every Friday evening",
    5: "The boats in the harbour of Zürich were painted",
}
MANY = 1_000

words = st.sampled_from(["red", "boat", "Kiel", "chess", "Anna's", "käse", "42", "and", "NEAR"])
sentences = st.lists(words, min_size=1, max_size=8).map(" ".join)


def index_of(documents: dict[int, str]) -> LexicalIndex:
    index = LexicalIndex()
    index.add(documents.items())
    return index


def test_documents_that_share_words_are_found_best_first() -> None:
    index = index_of(BOATS)
    assert list(index.search("Which boat did Anna buy?", 10)) == [1, 5]
    assert list(index.search("sailed", 10)) == [1], "words are stemmed"
    assert list(index.search("zurich", 10)) == [5], "accents do not count"
    assert index.search("nothing like that", 10) == {}
    assert list(index.search("boat", 1)) == [5], "the shorter one; no more than asked for"


def test_a_snapshot_does_not_see_later_documents() -> None:
    index = index_of(BOATS)
    assert list(index.search("boat", 10, np.array([1, 2]))) == [1]


@given(st.text(max_size=60))
def test_no_question_is_syntax(question: str) -> None:
    index = index_of(BOATS)
    assert set(index.search(question, 10)) <= set(BOATS)


@pytest.mark.parametrize(
    "question", ['"', "NEAR(boat", "text:boat*", "boat AND NOT chess", "^boat"]
)
def test_operators_are_words(question: str) -> None:
    assert (1 in index_of(BOATS).search(question, 10)) == ("boat" in question)


def test_a_very_long_question_is_cut() -> None:
    index = index_of(BOATS)
    filler = " ".join(f"w{n}" for n in range(MAX_WORDS))
    assert index.search(f"{filler} boat", 10) == {}
    assert 1 in index.search(f"boat {filler * 20}", 10)


@given(st.lists(sentences, min_size=1, max_size=12), st.integers(0, 12), sentences)
def test_adding_bit_by_bit_ranks_as_adding_at_once(
    texts: list[str], cut: int, question: str
) -> None:
    numbered = list(enumerate(texts, start=1))
    whole, parts = LexicalIndex(), LexicalIndex()
    whole.add(numbered)
    parts.add(numbered[:cut])
    parts.add(numbered[cut:])
    assert parts.last_number == whole.last_number == len(texts)
    assert parts.search(question, 9) == whole.search(question, 9)


odd_words = st.sampled_from(["red", "boat", "boats", "foo_bar", "_", "käse", "42", "the", "a_b_c"])


@given(
    st.lists(st.lists(odd_words, max_size=8).map(" ".join), max_size=14),
    st.sets(st.integers(1, 16)),
    st.lists(odd_words, max_size=6).map(" ".join),
    st.integers(1, 12),
)
def test_a_search_among_some_is_that_of_an_index_of_them_alone(
    texts: list[str], some: set[int], question: str, limit: int
) -> None:
    whole, part = LexicalIndex(), LexicalIndex()
    whole.add(enumerate(texts, start=1))
    part.add((n, text) for n, text in enumerate(texts, start=1) if n in some)
    found = whole.search(question, limit, np.array(sorted(some), np.int64))
    alone = part.search(question, 99)
    assert set(found) <= set(alone) and len(found) == min(limit, len(alone))
    assert list(found.values()) == pytest.approx(list(alone.values())[:limit])
    assert list(found.values()) == pytest.approx([alone[n] for n in found])


def test_what_is_erased_is_overwritten() -> None:
    index = index_of({n: f"unmistakable{n} words" for n in range(1, 2000)})
    assert b"unmistakable" in index._db.serialize()
    index.erase()
    left = index._db.serialize()
    assert b"unmistakabl" not in left
    assert len(left) > 10_000, "the pages are still there"


# The budget.


def memory(number: int) -> HeldMemory:
    return HeldMemory(key(number), 0, RoutingTable(SEPARATE, torch.device("cpu")))


class Corpus:
    """Documents of one memory, and from which number on they were asked for."""

    def __init__(self, name: str, count: int) -> None:
        self.name, self.count = name, count
        self.asked: list[int] = []

    def __call__(self, first: int) -> Iterable[tuple[int, str]]:
        self.asked.append(first)
        for n in range(first, self.count + 1):
            yield n, f"{self.name}{n} and {self.name}"


def ask(
    lexicons: Indexes[LexicalIndex],
    held: HeldMemory,
    corpus: Corpus,
    question: str,
    check: Callable[[], None],
) -> dict[int, float] | None:
    return lexicons.ask(
        held, lambda index: index.search(question, 10), documents=corpus, check_wanted=check
    )


def search(
    lexicons: Indexes[LexicalIndex], held: HeldMemory, corpus: Corpus, question: str
) -> list[int] | None:
    found = ask(lexicons, held, corpus, question, lambda: None)
    lexicons.check_integrity()
    return None if found is None else list(found)


def size_of(count: int) -> int:
    index = LexicalIndex()
    index.add(Corpus("w", count)(1))
    return index.bytes


def test_an_index_is_made_once_and_follows_appends() -> None:
    lexicons, held, corpus = Indexes(LexicalIndex, 1 << 24), memory(1), Corpus("cat", 3)
    assert search(lexicons, held, corpus, "cat2") == [2]
    assert search(lexicons, held, corpus, "cat4") == []
    corpus.count = 4
    assert search(lexicons, held, corpus, "cat4") == [4]
    assert corpus.asked == [1, 4, 4], "only what was new was read"


def test_memories_do_not_share_words() -> None:
    lexicons = Indexes(LexicalIndex, 1 << 24)
    cats, dogs = memory(1), memory(2)
    assert search(lexicons, cats, Corpus("cat", 3), "cat1 dog1") == [1]
    assert search(lexicons, dogs, Corpus("dog", 3), "cat1 dog1") == [1]
    assert search(lexicons, dogs, Corpus("dog", 3), "cat1") == []


def test_the_least_recently_used_makes_room() -> None:
    one = size_of(MANY)
    lexicons = Indexes(LexicalIndex, 2 * one + one // 2)
    held = [memory(n) for n in range(3)]
    corpora = [Corpus(f"w{n}x", MANY) for n in range(3)]
    for n in (0, 1, 0, 2):
        assert search(lexicons, held[n], corpora[n], f"w{n}x7") == [7]
    assert [corpus.asked.count(1) for corpus in corpora] == [1, 1, 1]
    assert search(lexicons, held[0], corpora[0], "w0x7") == [7]
    assert corpora[0].asked.count(1) == 1, "still there"
    assert search(lexicons, held[1], corpora[1], "w1x7") == [7]
    assert corpora[1].asked.count(1) == 2, "made again"


def test_an_index_without_room_is_not_tried_again_and_again() -> None:
    lexicons, held, corpus = Indexes(LexicalIndex, size_of(MANY) // 2), memory(1), Corpus("w", MANY)
    assert search(lexicons, held, corpus, "w7") is None
    assert lexicons.bytes == 0
    assert search(lexicons, held, corpus, "w7") is None
    assert len(corpus.asked) == 1
    small = Corpus("cat", 3)
    assert search(lexicons, memory(2), small, "cat1") == [1], "others are not kept from theirs"


def test_a_dropped_index_leaves_nothing() -> None:
    lexicons, held = Indexes(LexicalIndex, 1 << 24), memory(1)
    search(lexicons, held, Corpus("cat", 3), "cat1")
    assert lexicons.bytes > 0
    lexicons.drop(held)
    lexicons.drop(held)
    assert lexicons.bytes == 0


def test_a_caller_that_left_stops_the_work_and_loses_nothing() -> None:
    class GoneError(Exception):
        pass

    looks = []

    def check() -> None:
        looks.append(1)
        if len(looks) == 2:
            raise GoneError

    lexicons, held, corpus = Indexes(LexicalIndex, 1 << 24), memory(1), Corpus("w", MANY)
    with pytest.raises(GoneError):
        ask(lexicons, held, corpus, "w7", check)
    lexicons.check_integrity()
    assert search(lexicons, held, corpus, "w7") == [7]
    assert corpus.asked[0] == 1 and corpus.asked[1] > 1, "the first batch was kept"


class Garbled(Corpus):
    """Its last document's text is no text."""

    def __call__(self, first: int) -> Iterable[tuple[int, str]]:
        yield from super().__call__(first)
        yield self.count + 1, "\ud800"


def test_an_index_that_failed_at_a_batch_is_made_afresh() -> None:
    """Half of the batch may be in it, and its transaction is open."""
    lexicons, held = Indexes(LexicalIndex, 1 << 24), memory(1)
    assert search(lexicons, held, Corpus("cat", 1), "cat") == [1]
    with pytest.raises(UnicodeEncodeError):
        search(lexicons, held, Garbled("cat", 2), "cat")
    lexicons.check_integrity()
    assert lexicons.bytes == 0
    sound = Corpus("cat", 3)
    assert search(lexicons, held, sound, "cat") == [1, 2, 3]
    assert sound.asked == [1]


def test_many_threads_and_little_room() -> None:
    lexicons = Indexes(LexicalIndex, 2 * size_of(200))
    held = [memory(n) for n in range(5)]
    wrong: list[object] = []

    def work(offset: int) -> None:
        for turn in range(30):
            n = (offset + turn) % 5
            found = search_quietly(lexicons, held[n], f"w{n}x")
            if found not in (None, [7]):
                wrong.append(found)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    lexicons.check_integrity()


def search_quietly(
    lexicons: Indexes[LexicalIndex], held: HeldMemory, name: str
) -> list[int] | None:
    found = ask(lexicons, held, Corpus(name, 200), f"{name}7", lambda: None)
    return None if found is None else list(found)


# The blend.

scores = st.dictionaries(st.integers(0, 30), st.floats(-5, 50, allow_nan=False), max_size=20)


@given(scores, scores, st.floats(0, 1), st.integers(1, 40))
def test_a_blend_is_ordered_and_within_0_and_1(
    routed: dict[int, float], lexical: dict[int, float], weight: float, limit: int
) -> None:
    ranked = blend(routed, lexical, weight, limit)
    assert len(ranked) == min(limit, len(routed.keys() | lexical.keys()))
    assert {n for n, _ in ranked} <= routed.keys() | lexical.keys()
    assert all(0 <= score <= 1 + 1e-9 for _, score in ranked)
    assert ranked == sorted(ranked, key=lambda item: (-item[1], item[0]))


def test_a_blend_weighs_both_lists() -> None:
    routed, lexical = {1: 4.0, 2: 3.0, 3: 2.0}, {3: 20.0, 4: 10.0, 1: 0.0}
    assert [n for n, _ in blend(routed, {}, 0.5, 9)] == [1, 2, 3]
    assert [n for n, _ in blend(routed, lexical, 0, 3)] == [1, 2, 3]
    assert [n for n, _ in blend(routed, lexical, 1, 2)] == [3, 4]
    assert blend(routed, lexical, 0.5, 9) == [(1, 0.5), (3, 0.5), (2, 0.25), (4, 0.25)]
    assert blend({7: 3.0}, {}, 0.25, 9) == [(7, 0.75)], "a list of one is all best"
    assert DEPTH >= 50, "as measured"
