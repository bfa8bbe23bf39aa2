"""What is read, what is refused, and what must not be trained on."""

from __future__ import annotations

from pathlib import Path

import pytest
import zstandard

from model_adapter.training.data import Document, Question, QuestionSet, read_set
from model_adapter.training.errors import DataError, SettingsError
from model_adapter.training.hygiene import Evaluation, check_licence, clean
from storage.documents import TextSource
from tests.support.training_sets import write_places, write_rows

LONG = (
    "The committee met on the first Monday of every month and wrote down, without fail, "
    "all it said."
)


def test_sets_are_read_plain_and_compressed(tmp_path: Path) -> None:
    write_places(tmp_path)
    plain = read_set(tmp_path, "train_places")
    assert len(plain.documents) == len(plain.questions) == 64
    document = plain.documents["mill-bell"]
    assert document.text == f"The bell\n{document.body}", "as stored documents are rendered"
    for path in list(tmp_path.glob("train_*")):
        packed = zstandard.ZstdCompressor().compress(path.read_bytes())
        path.with_name(path.name + ".zst").write_bytes(packed)
        path.unlink()
    assert read_set(tmp_path, "train_places") == plain


@pytest.mark.parametrize(
    ("file", "line", "match"),
    [
        ("corpus", "{", "line 65"),
        ("corpus", "[1]", "line 65: not an object"),
        ("corpus", '{"doc_id": "x"}', "line 65: text is missing"),
        ("corpus", '{"doc_id": "x", "text": " "}', "text is missing, empty"),
        ("corpus", '{"doc_id": "mill-bell", "text": "x"}', "'mill-bell' stands twice"),
        ("corpus", '{"doc_id": "x", "text": "x", "title": 3}', "title"),
        ("questions", '{"question": "x", "gold_doc_ids": ["no"]}', "'no' is not in the corpus"),
        ("questions", '{"question": "x", "gold_doc_ids": "mill-bell"}', "not a list of texts"),
        ("questions", '{"gold_doc_ids": ["mill-bell"]}', "line 65: question is missing"),
        (
            "questions",
            '{"question": "x", "gold_doc_ids": ["mill-bell"], "answers": [1]}',
            "answers",
        ),
        ("questions", "\udcff", "cannot be read"),
    ],
)
def test_broken_lines_are_named(tmp_path: Path, file: str, line: str, match: str) -> None:
    write_places(tmp_path)
    path = tmp_path / f"train_places.{file}.jsonl"
    path.write_bytes(path.read_bytes() + line.encode(errors="surrogateescape") + b"\n")
    with pytest.raises(DataError, match=match):
        read_set(tmp_path, "train_places")


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no train_places\.corpus"):
        read_set(tmp_path, "train_places")
    write_places(tmp_path)
    (tmp_path / "train_places.corpus.jsonl").unlink()
    (tmp_path / "train_places.corpus.jsonl.zst").write_bytes(b"not zstandard")
    with pytest.raises(DataError, match="cannot be read"):
        read_set(tmp_path, "train_places")


def _set(bodies: dict[str, str], questions: list[Question]) -> QuestionSet:
    documents = {id_: Document.of(id_, TextSource(body), body) for id_, body in bodies.items()}
    return QuestionSet("train_x", documents, questions)


def test_what_evaluation_holds_is_dropped(tmp_path: Path) -> None:
    write_rows(
        tmp_path / "eval_a.corpus.jsonl",
        [{"doc_id": "1", "text": f"An introduction first. {LONG} And then some."}],
    )
    write_rows(tmp_path / "eval_a.questions.jsonl", [{"question": "Who  met, on Mondays?"}])
    write_rows(tmp_path / "mem_b.corpus.jsonl", [{"doc_id": "2", "text": "Anna: See you!"}])
    evaluation = Evaluation.read(sorted(tmp_path.glob("*.jsonl")))
    dirty = _set(
        {
            "inside": f"{LONG.upper()} It goes on in another way.",
            "short": "anna, see you",
            "near": LONG.replace("Monday", "Tuesday"),
            "start": "Anna: see you tomorrow at the old harbour, and bring the dog along, please.",
        },
        [
            Question("who met on mondays", ("near",)),
            Question("who met on tuesdays", ("near",)),
            Question("what was said", ("inside",)),
            Question("all of it", ("near", "short")),
        ],
    )
    ((kept, dropped),) = clean([dirty], evaluation)
    assert sorted(kept.documents) == ["near", "start"]
    assert [question.text for question in kept.questions] == ["who met on tuesdays"]
    assert (dropped.questions, dropped.documents) == (3, 2)


def test_the_first_80_characters_decide() -> None:
    evaluation = Evaluation([], [LONG])
    assert evaluation.held([LONG[:80] + " but then it differs"]) == {
        LONG[:80] + " but then it differs"
    }
    assert evaluation.held([LONG[:60] + " but then it differs a lot"]) == set()
    assert evaluation.held([]) == set()


@pytest.mark.parametrize("licence", ["CC-BY-NC-4.0", "", "unknown", "CC-BY-NC-2.0"])
def test_sets_that_may_not_be_shipped(licence: str) -> None:
    check_licence("train_x", "CC-BY-SA-4.0")
    with pytest.raises(SettingsError, match="may not be shipped"):
        check_licence("train_x", licence)
