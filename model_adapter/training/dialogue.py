"""Conversations made up from templates of our own, with questions about single turns.

As documents they are turns, or whole sessions of a longer conversation.

Memory is asked about what people said of their lives, and no training set at hand has that.
Every conversation has two speakers with names, dates that pass, turns that tell something
and turns that only keep talk going; a question names the speaker and what it is about.
"""

from __future__ import annotations

import re
import tomllib
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from typing import NamedTuple

import numpy as np

from model_adapter.training.data import Document, Question, QuestionSet
from storage.documents import Conversation, Role, TextSource, Turn


class Fact(NamedTuple):
    """Ways to tell one thing, and (question, answer) pairs about it."""

    told: tuple[str, ...]
    asked: tuple[tuple[str, str], ...]


_WORDS = tomllib.loads(files(__package__).joinpath("dialogue.toml").read_text(encoding="utf-8"))
NAMES: tuple[str, ...] = tuple(_WORDS["names"])
REPLIES: tuple[str, ...] = tuple(_WORDS["replies"])
ASIDES: tuple[str, ...] = tuple(_WORDS["asides"])
SLOTS: dict[str, tuple[str, ...]] = {key: tuple(held) for key, held in _WORDS["slots"].items()}
_UNITS = ("", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_MONTHS = (*SLOTS["month"], "December")


def _numbers() -> tuple[str, ...]:
    """20 to 99, in words and in digits: what a reader has to copy, not to guess."""
    spelt = [f"{ten}-{unit}" if unit else ten for ten in _TENS for unit in _UNITS]
    return (*spelt, *(str(number) for number in range(20, 100)))


SLOTS |= {
    "number": _numbers(),
    "date": tuple(f"{day} {month}" for month in _MONTHS for day in range(1, 29)),
    "price": tuple(
        f"{amount} {unit}" for amount in range(12, 990, 7) for unit in ("euros", "dollars")
    ),
    "time": tuple(f"{hour}:{minute:02}" for hour in range(8, 19) for minute in (5, 15, 30, 40)),
}
FACTS = tuple(
    Fact(tuple(fact["told"]), tuple((asked, answer) for asked, answer in fact["asked"]))
    for fact in _WORDS["facts"]
)

NAME = "generated_dialogues"
SESSIONS_NAME = "generated_sessions"
FACTS_EACH = 24
#: Share of turns that tell something.
TELLING = 0.6
#: Turns of a session, fewest and most; half of them tell something.
SESSION_TURNS = (10, 28)

_SLOT = re.compile(r"\{(\w+)\}")


def generate(conversations: int, seed: int) -> QuestionSet:
    """That many conversations of about 40 turns each, one document a turn."""
    rng = np.random.default_rng([seed, 0xD1A])
    found = QuestionSet(NAME)
    for number in range(conversations):
        _converse(found, f"{NAME}:{number}", rng)
    return found


def generate_sessions(conversations: int, seed: int) -> QuestionSet:
    """That many conversations of several sessions each, one document a session: as a text
    under its date, or as turns with theirs. Each speaker tells everything once."""
    rng = np.random.default_rng([seed, 0x5E5])
    found = QuestionSet(SESSIONS_NAME)
    for number in range(conversations):
        _meet(found, f"{SESSIONS_NAME}:{number}", rng)
    return found


def _meet(found: QuestionSet, id_: str, rng: np.random.Generator) -> None:
    speakers, moment = _begin(rng)
    told = [(place, fact) for place in (0, 1) for fact in FACTS]
    told = [told[int(n)] for n in rng.permutation(len(told))]
    as_text = rng.random() < 0.5
    while told:
        turns: list[Turn] = []
        asked: list[Question] = []
        name = f"{id_}:{len(found.documents)}"
        for place in range(int(rng.integers(*SESSION_TURNS))):
            tells = bool(told) and rng.random() < 0.5
            speaks, fact = told.pop() if tells else (place % 2, None)
            values = {"me": speakers[speaks], "you": speakers[1 - speaks]}
            moment += timedelta(minutes=int(rng.integers(1, 5)))
            turns.append(Turn(Role.USER, _turn(fact, values, rng), moment, speakers[speaks]))
            if fact is not None:
                asked += _questions(fact, name, values, rng)
        body = "\n".join(f"{turn.speaker}: {turn.text}" for turn in turns)
        title = f"{turns[0].occurred_at:%-d %B %Y, %H:%M}" if as_text else ""
        source = TextSource(body, title) if as_text else Conversation(tuple(turns))
        found.documents[name] = Document.of(name, source, body, title=title, scope=id_)
        found.questions += asked
        moment += timedelta(hours=int(rng.integers(20, 400)))


def _begin(rng: np.random.Generator) -> tuple[tuple[str, str], datetime]:
    """Two speakers, and when they begin."""
    first, second = rng.permutation(len(NAMES))[:2]
    hours = int(rng.integers(24 * 1200))
    return (NAMES[first], NAMES[second]), datetime(2021, 1, 1, 9, tzinfo=UTC) + timedelta(
        hours=hours
    )


def _pick(options: tuple[str, ...], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]


def _fill(template: str, values: dict[str, str], rng: np.random.Generator) -> str:
    """Slots get values, the same one wherever a name recurs."""

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if name not in values:
            values[name] = _pick(SLOTS[re.sub(r"\d$", "", name)], rng)
        return values[name]

    return _SLOT.sub(value, template)


def _converse(found: QuestionSet, id_: str, rng: np.random.Generator) -> None:
    speakers, moment = _begin(rng)
    facts = [FACTS[place] for place in rng.permutation(len(FACTS))[:FACTS_EACH]]
    place = 0
    while facts:
        speaker, other = speakers[place % 2], speakers[1 - place % 2]
        moment += timedelta(minutes=int(rng.integers(1, 5)))
        if rng.random() < 0.08:
            moment += timedelta(hours=int(rng.integers(20, 400)))
        fact = facts.pop() if rng.random() < TELLING else None
        values = {"me": speaker, "you": other}
        text = _turn(fact, values, rng)
        turn = Turn(Role.USER, text, moment, speaker)
        document = Document.of(f"{id_}:{place}", Conversation((turn,)), text, scope=id_)
        found.documents[document.id] = document
        if fact is not None:
            found.questions += _questions(fact, document.id, values, rng)
        place += 1


def _turn(fact: Fact | None, values: dict[str, str], rng: np.random.Generator) -> str:
    parts = []
    if fact is None or rng.random() < 0.4:
        parts.append(_fill(_pick(REPLIES, rng), values, rng))
    if fact is not None:
        parts.append(_fill(_pick(fact.told, rng), values, rng))
    if rng.random() < 0.35:
        parts.append(_fill(_pick(ASIDES, rng), values, rng))
    return " ".join(parts)


def _questions(
    fact: Fact, id_: str, values: dict[str, str], rng: np.random.Generator
) -> list[Question]:
    chosen = rng.permutation(len(fact.asked))[:2]
    questions = []
    for place in chosen:
        asked, answer = fact.asked[int(place)]
        text = _fill(asked, values, rng)
        questions.append(Question(text, (id_,), (_fill(answer, values, rng),)))
    return questions
