"""Reading question banks."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from benchmarks.quality import banks, sampling
from benchmarks.quality.banks import BankError
from storage.documents import Conversation, TextSource
from tests.support.tiny_banks import HARBOUR, HARBOUR_QUESTIONS, asked, harbour, write_bank

DIALOGUE = (
    {"doc_id": "a:1", "title": "a s1 1:56 pm on 8 May, 2023", "text": "Ines: hello.", "conv": "a"},
    {
        "doc_id": "a:2",
        "title": "a s1 29.12.2023, 00:51:12",
        "text": "Mr. Bo: two\nlines",
        "conv": "a",
    },
    {"doc_id": "b:1", "title": "b March-15-2024", "text": "user: x\nassistant: y", "conv": "b"},
)
DIALOGUE_QUESTIONS = (
    asked("qa", "Who?", "Ines", "a:1", conv="a"),
    asked("qb", "What?", "", "b:1", conv="b"),
    asked("qc", "Without gold?", "no", conv="a"),
)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_bank_is_found_by_name_prefix_and_folder(tmp_path: Path, compressed: bool) -> None:
    write_bank(tmp_path / "mem_tides", HARBOUR, HARBOUR_QUESTIONS, compressed=compressed)
    folder = tmp_path / "folder"
    folder.mkdir()
    for path in tmp_path.glob("mem_tides.*"):
        (folder / path.name.removeprefix("mem_tides.")).write_bytes(path.read_bytes())
    elsewhere = tmp_path / "nowhere"
    by_name = banks.read("tides", tmp_path)
    by_prefix = banks.read(str(tmp_path / "mem_tides"), elsewhere)
    by_folder = banks.read(str(folder), elsewhere)
    assert by_name.name == by_prefix.name == "mem_tides"
    assert by_folder.name == "folder"
    assert by_name.scopes == by_prefix.scopes == by_folder.scopes
    assert [document.text for document in by_name.scopes[""].documents] == [
        row["text"] for row in HARBOUR
    ]


def test_conversations_are_scopes_and_their_lines_are_turns(tmp_path: Path) -> None:
    write_bank(tmp_path / "talk", DIALOGUE, DIALOGUE_QUESTIONS)
    bank = banks.read("talk", tmp_path)
    assert list(bank.scopes) == ["a", "b"]
    assert [question.id for question in bank.questions] == ["qa", "qb"]  # qc has no gold
    first, second = bank.scopes["a"].documents
    assert first.text == "Ines (8 May 2023, 13:56): hello."
    assert isinstance(first.source, Conversation)
    assert isinstance(second.source, TextSource)  # two lines are more than one turn
    assert second.source.occurred_at == datetime(2023, 12, 29, 0, 51, 12, tzinfo=UTC)
    assert bank.scopes["b"].documents[0].text.startswith("(15 March 2024, 00:00)")
    assert bank.scopes["a"].numbers() == {"a:1": 1, "a:2": 2}


def test_dates_can_be_left_out(tmp_path: Path) -> None:
    write_bank(tmp_path / "talk", DIALOGUE, DIALOGUE_QUESTIONS)
    bank = banks.read("talk", tmp_path, dates=False)
    assert bank.scopes["a"].documents[0].text == "Ines: hello."


def test_a_title_is_part_of_a_text(tmp_path: Path) -> None:
    corpus = [{"doc_id": "d", "title": "Harbours", "text": "They silt up."}]
    write_bank(tmp_path / "one", corpus, [asked("q", "What?", "silt", "d")])
    assert banks.read("one", tmp_path).scopes[""].documents[0].text == "Harbours\nThey silt up."


def test_a_limit_draws_the_same_questions_again(tmp_path: Path) -> None:
    questions = [asked(f"q{n}", f"Which {n}?", "x", "d1") for n in range(40)]
    write_bank(tmp_path / "many", HARBOUR, questions)
    drawn = [banks.read("many", tmp_path, limit=10, seed=3).questions for _ in range(2)]
    other = banks.read("many", tmp_path, limit=10, seed=4).questions
    assert drawn[0] == drawn[1] != other
    assert [q.id for q in drawn[0]] == sorted((q.id for q in drawn[0]), key=lambda q: int(q[1:]))
    assert len(banks.read("many", tmp_path, limit=99).questions) == 40


def test_scopes_are_limited_by_conversation(tmp_path: Path) -> None:
    write_bank(tmp_path / "talk", DIALOGUE, DIALOGUE_QUESTIONS)
    assert list(banks.read("talk", tmp_path, scopes=1).scopes) == ["a"]


@pytest.mark.parametrize(
    ("corpus", "questions", "message"),
    [
        ([{"doc_id": "d1"}], HARBOUR_QUESTIONS, "row 1 has no text in 'text'"),
        ([HARBOUR[0], HARBOUR[0]], HARBOUR_QUESTIONS[:1], "d1"),
        (HARBOUR, [asked("q", "Who?", "x", "d9")], "no document 'd9'"),
        (HARBOUR, [{"id": "q"}], "row 1 has no text in 'question'"),
        (HARBOUR, [asked("q", "Who?", "x", "d1", conv="c")], "no document of 'c'"),
    ],
)
def test_a_broken_bank_is_refused(
    tmp_path: Path, corpus: list[object], questions: list[object], message: str
) -> None:
    write_bank(tmp_path / "broken", corpus, questions)  # type: ignore[arg-type]  # broken rows
    with pytest.raises(BankError, match=message):
        banks.read("broken", tmp_path)


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    harbour(tmp_path)
    with (tmp_path / "harbour.corpus.jsonl").open("a") as file:
        file.write("{broken\n")
    with pytest.raises(BankError, match=r"harbour\.corpus\.jsonl:5"):
        banks.read("harbour", tmp_path)
    (tmp_path / "harbour.corpus.jsonl").write_text("[]\n")
    with pytest.raises(BankError, match="not an object"):
        banks.read("harbour", tmp_path)


def test_an_unknown_bank_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(BankError, match="no bank 'atlantis'"):
        banks.read("atlantis", tmp_path)


def _long_bank(folder: Path) -> banks.Bank:
    corpus = [{"doc_id": f"d{n}", "text": f"Document {n:02} " + "x" * 88} for n in range(40)]
    questions = [asked(f"q{n}", f"Which is {n}?", str(n), f"d{n}") for n in range(40)]
    return banks.read(str(write_bank(folder / "long", corpus, questions)), folder)


def test_a_sample_keeps_gold_and_fills_up_with_others(tmp_path: Path) -> None:
    bank = _long_bank(tmp_path)
    drawn = [sampling.draw(bank, questions=5, characters=1500, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0].scopes == drawn[1].scopes != drawn[2].scopes
    ids = [document.id for document in drawn[0].scopes[""].documents]
    assert len(drawn[0].questions) == 5 and len(ids) == 15
    assert ids == [d.id for d in bank.scopes[""].documents if d.id in ids], "the bank's order"
    assert all(question.gold <= set(ids) for question in drawn[0].questions)
    small = sampling.draw(bank, questions=5, characters=1, seed=1)
    assert small.documents == 5, "gold documents are kept whatever the bound"
    assert sampling.draw(bank, questions=0, characters=0, seed=1).scopes == bank.scopes


def test_a_sample_takes_conversations_whole(tmp_path: Path) -> None:
    corpus = [
        {"doc_id": f"{conv}:{n}", "text": f"Ines: {'y' * 93}", "conv": conv}
        for conv in "abcd"
        for n in range(5)
    ]
    questions = [asked(f"q{conv}", "Who?", "Ines", f"{conv}:1", conv=conv) for conv in "abcd"]
    bank = banks.read(str(write_bank(tmp_path / "talks", corpus, questions)), tmp_path)
    drawn = sampling.draw(bank, questions=0, characters=1100, seed=3)
    assert len(drawn.scopes) == 2
    assert all(len(scope.documents) == 5 for scope in drawn.scopes.values())
    one = sampling.draw(bank, questions=0, characters=0, seed=3, left_out=["a", "c", "d"])
    assert list(one.scopes) == ["b"]
    with pytest.raises(BankError, match="no conversation 'e'"):
        sampling.draw(bank, questions=0, characters=0, seed=3, left_out=["e"])
