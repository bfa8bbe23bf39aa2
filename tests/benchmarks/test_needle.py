"""Needles: what is hidden, what is asked, and known figures."""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import needle, sizes
from benchmarks.needle import FORMS, FREE, Haystack, Plan, measure, needles, number_of
from model_adapter.engine import Arrange, LexicalPrior, MemoryView, RankedDocument
from model_adapter.fake import FakeEngine


@given(st.sampled_from(FORMS), st.integers(), st.integers(min_value=32, max_value=10**6))
def test_what_is_asked_is_hidden(form: str, seed: int, last: int) -> None:
    hidden = needles(form, random.Random(seed), last)
    assert len(hidden.texts) == (1 if form == "single" else 4)
    assert len(hidden.codes) == len(hidden.wanted) == (4 if form in FORMS[2:] else 1)
    assert hidden.wanted <= hidden.texts.keys()
    assert all(number % FREE == 0 and FREE <= number <= last for number in hidden.texts)
    told = [text for number, text in hidden.texts.items() if number in hidden.wanted]
    for code, text in zip(hidden.codes, told, strict=True):
        key = text.partition("code for the ")[2].removesuffix(f" is {code}.")
        assert key != text and key in hidden.question
    for number in hidden.texts.keys() - hidden.wanted:
        key = hidden.texts[number].partition("code for the ")[2].partition(" is ")[0]
        assert key not in hidden.question


@given(st.lists(st.integers(min_value=0, max_value=10**6), unique=True))
def test_turns_leave_their_numbers_to_needles(places: list[int]) -> None:
    numbers = [number_of(place) for place in places]
    assert len(set(numbers)) == len(places)
    assert all(number % FREE for number in numbers)
    assert sorted(numbers) == [number_of(place) for place in sorted(places)]


@pytest.fixture(scope="module")
def haystack(tmp_path_factory: pytest.TempPathFactory) -> Haystack:
    return Haystack(FakeEngine(), 6_000, tmp_path_factory.mktemp("cache"), content=True)


SIZES = {"2K": 2_000, "6K": 6_000}


def test_a_word_index_finds_every_needle(haystack: Haystack) -> None:
    found = measure(FakeEngine(), haystack, SIZES, Plan(trials=3, answers=3))
    assert found["2K"]["documents"] < found["6K"]["documents"]
    for size, tokens in SIZES.items():
        assert tokens <= found[size]["tokens"] < tokens + 100
        for form in FORMS:
            assert found[size][form]["found"] == 1.0
        # The fake engine quotes one document: one code of four.
        assert found[size]["single"]["answered"] == 1.0
        assert found[size]["multi_key"]["answered"] == 1.0
        assert found[size]["multi_value"]["answered"] == 0.25
        assert found[size]["multi_query"]["answered"] == 0.25


def test_one_document_holds_a_quarter_of_four_needles(haystack: Haystack) -> None:
    plan = Plan(trials=3, documents=1)
    found = measure(FakeEngine(), haystack, {"2K": 2_000}, plan)["2K"]
    assert found["single"] == found["multi_key"] == {"found": 1.0, "answered": None}
    assert found["multi_value"]["found"] == found["multi_query"]["found"] == 0.25


class Blind(FakeEngine):
    """Routes to the first documents of a memory, whatever is asked."""

    def route(
        self,
        question: str,
        memory: MemoryView,
        limit: int,
        prior: LexicalPrior | None = None,
        arrange: Arrange | None = None,
    ) -> list[RankedDocument]:
        return [RankedDocument(int(number), 0.0, ()) for number in memory.numbers_N[:limit]]


def test_an_engine_that_finds_nothing_has_zero(haystack: Haystack) -> None:
    found = measure(Blind(), haystack, {"6K": 6_000}, Plan(trials=3, documents=5))["6K"]
    assert [found[form]["found"] for form in FORMS] == [0.0] * 4


def test_the_command_prints_one_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", "fake", "--sizes", "1K,2K", "--trials", "2", "--form", "single"]
    options += ["--cache", str(tmp_path), "--json"]
    assert needle.main(options) == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result["sizes"]) == ["1K", "2K"]
    assert result["sizes"]["2K"]["single"] == {"found": 1.0, "answered": None}
    assert "multi_key" not in result["sizes"]["2K"]


def test_an_unusable_model_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert needle.main(["--model", "nowhere.gguf", "--data-dir", str(tmp_path)]) == 2
    assert "UnusableModelError" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "parsed"),
    [("1M,4k", {"4K": 4_000, "1M": 1_000_000}), ("512", {"512": 512})],
)
def test_sizes(text: str, parsed: dict[str, int]) -> None:
    assert list(sizes.parse(text).items()) == list(parsed.items())


@pytest.mark.parametrize("text", ["", "0", "4G", "1.5K", "-3", "4K,"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        sizes.parse(text)


def test_the_same_needles_are_hidden_again(haystack: Haystack) -> None:
    draws: Sequence[needle.Needles] = [needles("multi_key", random.Random(7), 99) for _ in "ab"]
    assert draws[0] == draws[1] != needles("multi_key", random.Random(8), 99)
