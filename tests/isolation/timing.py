"""Whether time tells what exists: distributions of like calls, compared without assumptions.

Both calls of a pair alternate in random order, so that load falls on both alike. The
figure is the chance that a call about something that exists takes longer than one about
nothing: 0.5 tells nothing. Its error without any difference is about 0.41 / sqrt(rounds).
"""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import replace
from typing import Any

import numpy as np

from tests.isolation.matrix import NEVER
from tests.isolation.requests import BASES, Own
from tests.isolation.world import METHODS, World
from tests.support.served import Caller

_WARM_UP = 20
_DENIED = ("GetMemory", "ListDocuments", "GetDocument", "AppendTurns", "Query", "DeleteMemory")


async def compare(world: World, rounds: int) -> list[dict[str, Any]]:
    """One line per RPC and caller: medians in milliseconds, and the chance."""
    own = world.attacker.own
    theirs, nobodys = _about(own, world.victim.own.memory), _about(own, NEVER)
    callers = {"admin": world.attacker.admin, "neighbour": world.attacker.callers["neighbour"]}
    lines: list[dict[str, Any]] = []
    for who, caller in callers.items():
        for method in _DENIED:
            times = await _times(world, method, caller, (theirs, nobodys), rounds)
            lines.append(
                {
                    "rpc": method,
                    "caller": who,
                    "rounds": rounds,
                    "median_ms_theirs": round(statistics.median(times[0]) * 1e3, 3),
                    "median_ms_nobodys": round(statistics.median(times[1]) * 1e3, 3),
                    "chance_theirs_is_slower": round(_chance(*times), 3),
                }
            )
    return lines


def _about(own: Own, memory: str) -> Own:
    return replace(own, memory=memory)


async def _times(
    world: World, method: str, caller: Caller, pair: tuple[Own, Own], rounds: int
) -> tuple[list[float], list[float]]:
    assert method in METHODS
    times: tuple[list[float], list[float]] = ([], [])
    shuffle = random.Random(7)
    for turn in range(_WARM_UP + rounds):
        for which in shuffle.sample((0, 1), 2):
            stream = BASES[method](pair[which])
            started = time.perf_counter()
            outcome = await world.call(method, stream, caller, {})
            took = time.perf_counter() - started
            assert outcome.code == "NOT_FOUND", outcome
            if turn >= _WARM_UP:
                times[which].append(took)
    return times


def _chance(theirs: list[float], nobodys: list[float]) -> float:
    """Of a pair drawn at random, that the first is the slower one; ties count half."""
    left, right = np.array(theirs)[:, None], np.array(nobodys)[None, :]
    return float((left > right).mean() + (left == right).mean() / 2)
