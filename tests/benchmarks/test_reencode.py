"""A memory that moves to another model under load, with the server killed on the way: counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.counting import Encoded
from benchmarks.reencode import Asked, Load, Move, Options, figures, measure
from memsvc.client import AsyncClient


async def test_it_moves_under_load_and_goes_on_after_a_kill(tmp_path: Path) -> None:
    options = Options(
        tokens=800,
        old="fake",
        new="fake:name=new,pool_tokens=4,encode_ms=20",
        kill=("server",),
        questions=10,
        # Small batches, so that there is a middle to be killed in.
        settings=("encode_batch_documents=4", "log_level=error"),
    )
    found: Any = await measure(tmp_path, options)
    assert found["kills"] == 1
    assert 0 < found["done_at_kills"][0] < found["encoded"]
    assert found["redone"] == 0
    assert found["failed"] == 0
    assert found["answers_of_the_old_model_after"] == 0
    assert found["answers_of_the_new_model_after"] >= options.questions
    # All that was there and all that came, each at least once.
    assert found["encoded"] - found["encoded_twice"] >= found["documents"]
    assert found["questions"]["moving"] > 0
    assert found["p99_ratio"] > 0 and found["append_ms"]["moved"]["count"] > 0


class Counted:
    """What `figures` reads of a stage."""

    def __init__(self, encoded: list[Encoded]) -> None:
        self.proxy = self
        self.encoded = encoded


async def test_what_would_be_wrong_is_counted() -> None:
    asked = [
        Asked(0, 1, "old"),
        Asked(12, 13, "", "WORKER_UNAVAILABLE"),
        Asked(15, 16, "", "UNAVAILABLE"),
        Asked(17, 19, "new"),
        Asked(21, 22, "old"),
        Asked(21, 22, "new"),
    ]
    async with AsyncClient("unix:/nowhere", "key") as client:
        load = Load(client, Options(), [], asked)
        load.appends = [Asked(0, 1, ""), Asked(9, 11, ""), Asked(12, 15, ""), Asked(20, 21, "")]
    moved = Move(10, 20, [(14, 16, 5)])
    # The fifth was done before the kill; the sixth was on its way.
    stage: Any = Counted([Encoded(n, 11) for n in (4, 5, 6)] + [Encoded(n, 17) for n in (5, 6, 7)])
    found: Any = figures(load, moved, stage, "old", "new")
    assert found["questions"] == {"quiet": 1, "moving": 3, "moved": 2}
    assert (found["append_ms"]["quiet"]["count"], found["append_ms"]["moving"]["count"]) == (1, 2)
    assert found["append_p99_ratio"] == pytest.approx(3, rel=0.01)
    assert (found["failed"], found["failed_while_down"]) == (1, 1)
    assert found["answers_of_the_old_model_after"] == 1
    assert (found["encoded"], found["encoded_twice"], found["redone"]) == (6, 2, 1)
