"""The demo runs from end to end with the fake engine; the default model answers its questions."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from examples.demo import OPTIONS
from examples.demo_story import QUESTIONS, read_conversation
from model_adapter.blending import DEPTH
from model_adapter.checkpoints import load_engine_source
from model_adapter.engine import CitationEvent, DocumentText, Generate, LexicalPrior, TextEvent
from model_adapter.lexical import LexicalIndex
from model_adapter.msa.engine import MsaEngine
from model_adapter.msa.memory import InMemoryView
from storage.documents import Conversation, Role, Turn, render
from storage.paths import DataFolder
from tests.support.live import environment
from tests.support.tiny_msa import finish

ROOT = Path(__file__).parents[2]
#: Right answers of the demo's ten with the turn that says so cited, at least.
BAR = 9


def demo(*arguments: str, cache: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "examples.demo", "--cache", str(cache), *arguments],
        cwd=ROOT,
        env=environment() | {"COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


def test_it_tells_the_whole_story(tmp_path: Path) -> None:
    done = demo("--model", "fake", cache=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for question in QUESTIONS:
        assert question.text in done.stdout
    assert "10 of 10 answers are right" in done.stdout, "the fake engine quotes what it finds"
    assert "[43] 18 Jan 2026, Jun: Better. My mentor is Mr Hayashi" in done.stdout
    assert "68 blocks taken over, 0 to encode" in done.stdout
    assert done.stdout.count("is gone: MEMORY_NOT_FOUND") == 2
    assert "Everything is sound." in done.stdout
    assert "\x1b" not in done.stdout


def test_the_default_model_answers_nine_of_ten_from_the_turns_that_say_so() -> None:
    """As the demo asks it: a document a turn, the model's own settings, one question at a time."""
    torch.set_num_threads(1)
    engine = MsaEngine(load_engine_source("default", DataFolder(ROOT / ".data")))
    said = [turn for session in read_conversation().values() for turn in session]
    turns = (Turn(Role(one.role), one.text, one.occurred_at, one.speaker) for one in said)
    texts = {n: render(Conversation((turn,))) for n, turn in enumerate(turns, start=1)}
    encoded = engine.encode([DocumentText(number, text) for number, text in texts.items()])
    memory = InMemoryView(engine.description.layout, encoded.blocks, texts)
    words = LexicalIndex()
    words.add(texts.items())
    answers: dict[str, tuple[str, bool]] = {}
    for question in QUESTIONS:
        prior = LexicalPrior(engine.description.lexical_weight, words.search(question.text, DEPTH))
        asked = Generate(question.text, OPTIONS.max_answer_tokens, prior=prior)
        events = finish(engine, engine.start(asked, memory))[0]
        text = "".join(event.text for event in events if isinstance(event, TextEvent))
        cited = {event.number for event in events if isinstance(event, CitationEvent)}
        answers[question.text] = text, question.answered_by(text) and question.turn in cited
    assert sum(right for _, right in answers.values()) >= BAR, answers


def test_a_step_that_fails_fails_the_demo(tmp_path: Path) -> None:
    done = demo("--model", str(tmp_path / "none"), cache=tmp_path)  # its patience is ten minutes
    assert done.returncode == 1
    assert "The demo failed: the worker cannot serve" in done.stdout
    assert "nor a model directory" in done.stdout


def test_the_questions_are_answered_by_their_turns() -> None:
    turns = [turn for said in read_conversation().values() for turn in said]
    assert len(QUESTIONS) == 10
    for question in QUESTIONS:
        assert question.answered_by(turns[question.turn - 1].text)
        assert not question.answered_by(question.text)
        assert not question.answered_by("I don't know.")


def test_the_sample_conversation_is_long_and_dated() -> None:
    sessions = read_conversation()
    turns = [turn for said in sessions.values() for turn in said]
    assert len(sessions) >= 6
    assert len(turns) >= 60
    assert {turn.speaker for turn in turns} == {"Marta", "Jun"}
    times = [turn.occurred_at for turn in turns if turn.occurred_at]
    assert len(times) == len(turns)
    assert times == sorted(times)
    assert (times[-1] - times[0]).days > 180
