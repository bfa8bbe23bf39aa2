"""Questions and conversations that training makes up."""

from __future__ import annotations

import re

import numpy as np

from model_adapter.training import dialogue
from model_adapter.training.data import Document
from model_adapter.training.pseudo import PseudoQuestions, words_of
from storage.documents import TextSource

BODY = (
    "The lighthouse was built in 1871 by Clara Jensen near Skagen. "
    "Its lamp burns 14 litres a day. "
    "Sailors called it the grey lady, and told stories about the keeper."
)


def _document(body: str = BODY, title: str = "Grey Lady") -> Document:
    return Document.of("d", TextSource(body, title), body, title=title)


def test_pseudo_questions_come_from_the_passage() -> None:
    maker = PseudoQuestions([_document(), _document("Nothing to see here at all.")])
    rng = np.random.default_rng(3)
    made = [maker.make(_document(), rng) for _ in range(200)]
    asking = "who what which year how many is tell me about do we know did have to with when s"
    allowed = set(words_of(f"{BODY} Grey Lady grey lady's {asking}"))
    for question in made:
        assert question and set(words_of(question)) <= allowed, question
    assert len(set(made)) > 60
    assert any("which year" in question.lower() and "1871" not in question for question in made)
    assert any(question.endswith("?") for question in made)
    lower = sum(question == question.lower() for question in made) / len(made)
    assert 0.35 < lower < 0.85


def test_pseudo_questions_follow_the_generator() -> None:
    maker = PseudoQuestions([_document()])
    first, second = (maker.make(_document(), np.random.default_rng(9)) for _ in range(2))
    assert first == second
    assert maker.make(_document("…", title=""), np.random.default_rng(1)) == ""


def test_conversations_hold_their_answers() -> None:
    found = dialogue.generate(6, seed=5)
    assert found.documents == dialogue.generate(6, seed=5).documents
    assert found.documents != dialogue.generate(6, seed=6).documents
    assert len(found.documents) > 150 and len(found.questions) > 200
    for question in found.questions:
        (gold,) = question.gold
        document = found.documents[gold]
        speaker = document.text.split(" (")[0]
        assert speaker in question.text or speaker in question.answers[0]
        answer = re.sub(rf"^(in|on|every|to|the|a|for) |^{speaker}'s ", "", question.answers[0])
        held = document.text.lower()
        assert answer.lower() in held or answer == speaker or "was cancelled" in answer, question
        assert "{" not in question.text + question.answers[0] + document.text


def test_turns_of_a_conversation_are_dated_in_order() -> None:
    found = dialogue.generate(1, seed=2)
    assert {document.scope for document in found.documents.values()} == {f"{dialogue.NAME}:0"}
    texts = [document.text for document in found.documents.values()]
    assert all(re.match(r"\w+ \(\d{1,2} \w+ 20\d\d, \d\d:\d\d\): ", text) for text in texts)
    speakers = {text.split(" (")[0] for text in texts}
    assert len(speakers) == 2


def test_sessions_hold_their_answers() -> None:
    found = dialogue.generate_sessions(4, seed=5)
    assert found.documents == dialogue.generate_sessions(4, seed=5).documents
    forms = {
        "\n" in document.text and bool(document.title) for document in found.documents.values()
    }
    assert forms == {True, False}
    scopes = [document.scope for document in found.documents.values()]
    assert len(set(scopes)) == 4 and all(scopes.count(scope) > 3 for scope in scopes)
    for document in found.documents.values():
        lines = document.body.splitlines()
        assert 10 <= len(lines) < 28 and all(re.match(r"\w+: ", line) for line in lines)
        assert re.search(r"\d{1,2} \w+ 20\d\d, \d\d:\d\d", document.text)
    for question in found.questions:
        (gold,) = question.gold
        answer = re.sub(r"^(in|on|every|to|the|a|for) |^\w+'s ", "", question.answers[0]).lower()
        held = found.documents[gold].text.lower()
        assert answer in held or "was cancelled" in answer, question
