"""Generated conversation for benchmarks: seeded, dated, of our own making."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

PEOPLE = ("Mara", "Tobias", "Ines", "Oskar", "Leni", "Ravi", "Sofia", "Emil", "Hana", "Jonas")
PLACES = (
    "Lisbon",
    "the harbour",
    "Graz",
    "the lake house",
    "Turin",
    "the old mill",
    "Bergen",
    "Oaxaca",
)
THINGS = (
    "a cargo bike",
    "the blue violin",
    "a sourdough starter",
    "the leaking roof",
    "a used camera",
    "the garden fence",
    "a beehive",
    "the tax papers",
    "a telescope",
    "the spare key",
)
ACTIONS = (
    "bought",
    "repaired",
    "lost",
    "borrowed",
    "sold",
    "painted",
    "found",
    "finally sorted out",
)
FEELINGS = (
    "I was surprised how easy it was",
    "it took much longer than planned",
    "next time I would ask for help first",
    "we laughed about it all evening",
    "it cost more than we had agreed on",
    "I still think about what went wrong",
)
SMALL_TALK = (
    "How was your week, did you get any rest after the move?",
    "That sounds lovely, please send me a picture when you have one.",
    "I was thinking about cooking something simple tonight, maybe lentils with roasted carrots.",
    "We should meet again soon, the last time was far too short for everything we wanted to say.",
)


@dataclass(frozen=True)
class Line:
    """One turn of the workload."""

    speaker: str
    text: str
    occurred_at: datetime


def conversation(seed: int, turns: int) -> Iterator[Line]:
    """Turns of 10 to 60 words between two people, a few minutes apart, over many days."""
    rng = random.Random(seed)
    moment = datetime(2024, 1, 3, 9, 0, tzinfo=UTC)
    pair = rng.sample(PEOPLE, 2)
    for index in range(turns):
        moment += timedelta(minutes=rng.choice((2, 3, 7, 600, 2900)))
        text = " ".join(_sentence(rng) for _ in range(rng.randint(1, 3)))
        yield Line(pair[index % 2], text, moment)


def _sentence(rng: random.Random) -> str:
    if rng.random() < 0.25:
        return rng.choice(SMALL_TALK)
    day = rng.randint(1, 28)
    return (
        f"{rng.choice(PEOPLE)} {rng.choice(ACTIONS)} {rng.choice(THINGS)} in {rng.choice(PLACES)}"
        f" on the {day}th for {rng.randint(11, 990)} euros, and {rng.choice(FEELINGS)}."
    )
