"""Memory Parallel in two processes: every rank chooses what one that holds everything would."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_adapter.msa.config import LayerChoice
from model_adapter.msa.kernels import Shard
from tests.support import shard_rank

RANKS = 2


class Ranks:
    """The processes; each case goes to both."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-m", "tests.support.shard_rank"]
        self._processes = [
            subprocess.Popen(
                [*command, str(rank), str(RANKS), str(folder / "meet")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(RANKS)
        ]

    def ask(self, case: dict[str, Any]) -> list[dict[str, Any]]:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps(case) + "\n")
            process.stdin.flush()
        found = []
        for process in self._processes:
            assert process.stdout is not None
            found.append(json.loads(process.stdout.readline()))
        return found

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    processes = Ranks(tmp_path_factory.mktemp("ranks"))
    yield processes
    processes.close()


COUNTS = st.lists(st.integers(1, 9), min_size=RANKS, max_size=40)


@settings(max_examples=8, deadline=None)
@given(
    memories=st.lists(st.tuples(COUNTS, st.integers(1, 3)), min_size=1, max_size=3),
    k=st.integers(1, 12),
    together=st.booleans(),
    exact=st.booleans(),
    seed=st.integers(0, 999),
)
def test_ranks_choose_as_one_rank_does(
    ranks: Ranks,
    memories: list[tuple[list[int], int]],
    k: int,
    together: bool,
    exact: bool,
    seed: int,
) -> None:
    case: dict[str, Any] = {
        "counts": [counts for counts, _ in memories],
        "rows": [rows for _, rows in memories],
        "k": k,
        "together": together,
        "exact": exact,
        "seed": seed,
    }
    with torch.inference_mode():
        alone = json.loads(json.dumps(shard_rank.route(case, 0, 1)))
    for found in ranks.ask(case):
        assert found["chosen"] == alone["chosen"]
        if not exact:  # else which coarse scores stay differs by rank
            assert found["best"] == alone["best"]
            assert found["scores"] == alone["scores"]


@pytest.mark.parametrize("choice", list(LayerChoice))
def test_ranks_answer_as_one_rank_does(ranks: Ranks, choice: LayerChoice) -> None:
    """The content of the chosen comes from the rank that holds it."""
    case = {"choice": choice.value, "question": "who was born in the old city?"}
    alone = json.loads(json.dumps(shard_rank.answer(case, 0, 1)))
    assert alone["text"]
    assert ranks.ask(case) == [alone, alone]


@given(COUNTS)
def test_every_document_has_one_rank(counts: list[int]) -> None:
    offsets_N1 = np.concatenate(([0], np.cumsum(counts))).astype(np.int64)
    for many in range(1, min(len(counts), 5) + 1):
        held = [range(*Shard.of(offsets_N1, rank, many).own) for rank in range(many)]
        assert [n for documents in held for n in documents] == list(range(len(counts)))
        assert all(len(documents) for documents in held)
    with pytest.raises(ValueError, match="too few"):
        Shard.of(offsets_N1, 0, len(counts) + 1)
