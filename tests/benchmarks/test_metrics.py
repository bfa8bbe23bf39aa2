"""Known cases of recall, exact match and token F1."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.quality import metrics


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Eiffel Tower.", "eiffel tower"),
        ("  an   Apple,  a day ", "apple day"),
        ("theatre and anthem", "theatre and anthem"),
        ("U.S. $1,200", "us 1200"),
        ("the", ""),
    ],
)
def test_normalise(text: str, normal: str) -> None:
    assert metrics.normalise(text) == normal


@pytest.mark.parametrize(
    ("answer", "golds", "exact", "f1", "contains"),
    [
        ("the Rhine", ["Rhine"], 1, 1, 1),
        ("the river Rhine", ["Rhine"], 0, 2 / 3, 1),
        ("Rhineland", ["Rhine"], 0, 0, 0),
        ("in 1903, in Graz", ["Graz 1903"], 0, 2 * (2 / 4) * 1 / (2 / 4 + 1), 0),
        ("Graz", ["Vienna", "Graz"], 1, 1, 1),
        ("", ["Graz"], 0, 0, 0),
        ("the", ["an"], 1, 1, 0),
    ],
)
def test_answers(answer: str, golds: list[str], exact: float, f1: float, contains: float) -> None:
    assert metrics.exact_match(answer, golds) == exact
    assert metrics.token_f1(answer, golds) == pytest.approx(f1)
    assert metrics.contains(answer, golds) == contains


def test_recall_counts_the_share_of_the_gold_documents() -> None:
    assert metrics.recall([4, 7, 1, 2], {7}, 1) == 0
    assert metrics.recall([4, 7, 1, 2], {7}, 5) == 1
    assert metrics.recall([4, 7, 1, 2], {7, 9}, 5) == 0.5
    assert metrics.recall([], {7}, 5) == 0


@given(st.text(), st.lists(st.text(), min_size=1))
def test_f1_lies_between_exact_match_and_one(answer: str, golds: list[str]) -> None:
    assert metrics.exact_match(answer, golds) <= metrics.token_f1(answer, golds) <= 1


@given(st.text())
def test_normalising_twice_changes_nothing_but_new_articles(text: str) -> None:
    once = metrics.normalise(text)
    assert metrics.exact_match(once, [text]) == (metrics.normalise(once) == once)


def test_the_mean_of_nothing_is_none() -> None:
    assert metrics.mean([]) is None
    assert metrics.mean([1.0, 0.0, 0.0]) == 0.3333


@pytest.mark.parametrize(
    ("answer", "declines"),
    [
        ("I don't know.", 1),
        ("I don\u2019t know", 1),
        ("That is not mentioned in the text.", 1),
        ("There is no information about it", 1),
        ("I know: in Graz", 0),
        ("", 0),
    ],
)
def test_declining(answer: str, declines: float) -> None:
    assert metrics.declines(answer) == declines
