"""Routing against the formula as written: every reduction, both dtypes, ties, slabs."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from model_adapter.msa import routing
from model_adapter.msa.config import ChunkReduce, HeadReduce, MsaConfig, QueryReduce
from model_adapter.msa.routing import prepare, score_documents, select

HEADS, KV_HEADS, HEAD_DIM = 6, 3, 8


@dataclass(frozen=True)
class Keys:
    keys_CE: torch.Tensor
    chunk_offsets_N1: npt.NDArray[np.int64]
    slabs: int = 1

    @property
    def numbers_N(self) -> npt.NDArray[np.int64]:
        return np.arange(len(self.chunk_offsets_N1) - 1)

    def routing_keys(self, layer: int) -> Iterator[tuple[int, torch.Tensor]]:
        for part in np.array_split(np.arange(len(self.numbers_N)), self.slabs):
            if len(part):
                first = int(self.chunk_offsets_N1[part[0]])
                yield first, self.keys_CE[first : int(self.chunk_offsets_N1[part[-1] + 1])]

    def content(self, layer: int, documents: object) -> tuple[torch.Tensor, torch.Tensor]:
        raise AssertionError("routing reads no content")

    def text(self, number: int) -> str:
        raise KeyError(number)


def memory(documents: int, seed: int, dtype: torch.dtype, slabs: int = 1) -> Keys:
    counts = np.random.default_rng(seed).integers(1, 6, size=documents)
    generator = torch.Generator().manual_seed(seed)
    keys_CE = torch.randn(int(counts.sum()), KV_HEADS * HEAD_DIM, generator=generator)
    offsets = np.concatenate(([0], np.cumsum(counts))).astype(np.int64)
    return Keys(keys_CE.to(dtype), offsets, slabs)


def as_written(
    q_THD: torch.Tensor, votes_T: torch.Tensor, keys: Keys, msa: MsaConfig
) -> npt.NDArray[np.float64]:
    """Section 4 of the paper, in fp64, with everything materialised."""
    q_THD = q_THD.double()
    if msa.cosine:
        q_THD = functional.normalize(q_THD, dim=-1)
    if msa.query_scaled:
        q_THD = q_THD * HEAD_DIM**-0.5
    keys_HCD = keys.keys_CE.double().view(-1, KV_HEADS, HEAD_DIM).permute(1, 0, 2)
    keys_HCD = keys_HCD.repeat_interleave(HEADS // KV_HEADS, dim=0)
    scores_HTC = torch.einsum("thd,hcd->htc", q_THD, keys_HCD)
    scores_TC = scores_HTC.amax(0) if msa.head_reduce is HeadReduce.MAX else scores_HTC.mean(0)
    scores_TC = scores_TC[votes_T]
    if msa.query_reduce is QueryReduce.MAX:
        scores_C = scores_TC.amax(0)
    elif msa.query_reduce is QueryReduce.MEAN:
        scores_C = scores_TC.mean(0)
    else:
        scores_C = scores_TC[-1]
    reduce = np.max if msa.chunk_reduce is ChunkReduce.MAX else np.mean
    offsets = keys.chunk_offsets_N1
    return np.array([reduce(scores_C[a:b].numpy()) for a, b in itertools.pairwise(offsets)])


settings_of = st.builds(
    MsaConfig,
    routed_layers=st.just((0,)),
    decouple_router=st.booleans(),
    aux_loss_method=st.sampled_from(["INFONCE", "INFONCE_DECOUPLE", "BCE"]),
    head_reduce=st.sampled_from(HeadReduce),
    query_reduce=st.sampled_from(QueryReduce),
    chunk_reduce=st.sampled_from(ChunkReduce),
)


@settings(max_examples=120, deadline=None)
@given(
    msa=settings_of,
    documents=st.integers(1, 60),
    seed=st.integers(0, 10_000),
    k=st.integers(1, 20),
    bf16=st.booleans(),
    slabs=st.integers(1, 4),
)
def test_scores_and_choice_are_those_of_the_formula(
    msa: MsaConfig, documents: int, seed: int, k: int, bf16: bool, slabs: int
) -> None:
    dtype = torch.bfloat16 if bf16 else torch.float32
    keys = memory(documents, seed, dtype, slabs)
    generator = torch.Generator().manual_seed(seed + 1)
    q_THD = torch.randn(7, HEADS, HEAD_DIM, generator=generator).to(dtype)
    votes_T = torch.rand(7, generator=generator) < 0.6
    votes_T[seed % 7] = True
    query = prepare(q_THD, votes_T, KV_HEADS, msa, k=k)
    assert query is not None
    ours = score_documents(query, keys, 0)
    exact = as_written(q_THD, votes_T, keys, msa)
    chosen = select(ours, k)
    assert len(chosen) == min(k, documents)
    # What was chosen carries its fp32 score, and nothing better was passed over.
    np.testing.assert_allclose(ours[chosen], exact[chosen], atol=3e-5)
    left_out = np.setdiff1d(np.arange(documents), chosen)
    if len(left_out):
        assert exact[left_out].max() <= exact[chosen].min() + 3e-5
    assert np.abs(ours - exact).max() < (0.05 if bf16 else 3e-5)


def test_many_bf16_documents_get_the_choice_of_fp32() -> None:
    msa = MsaConfig(routed_layers=(0,), aux_loss_method="INFONCE_DECOUPLE")
    for seed in range(5):
        keys = memory(20_000, seed, torch.bfloat16)
        q_THD = torch.randn(8, HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(seed))
        query = prepare(q_THD.bfloat16(), torch.ones(8, dtype=torch.bool), KV_HEADS, msa, k=16)
        assert query is not None
        exact = as_written(q_THD.bfloat16(), torch.ones(8, dtype=torch.bool), keys, msa)
        ours = select(score_documents(query, keys, 0), 16)
        assert list(ours) == list(select(exact.astype(np.float32), 16))


def test_blocks_do_not_change_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    msa = MsaConfig(routed_layers=(0,), aux_loss_method="BCE")
    keys = memory(200, 3, torch.float32)
    q_THD = torch.randn(5, HEADS, HEAD_DIM)
    query = prepare(q_THD, torch.ones(5, dtype=torch.bool), KV_HEADS, msa, k=4)
    assert query is not None
    whole = score_documents(query, keys, 0)
    monkeypatch.setattr(routing, "BLOCK_CHUNKS", 37)
    np.testing.assert_allclose(score_documents(query, keys, 0), whole, atol=1e-6)


@given(
    scores=st.lists(st.sampled_from([-2e9, -np.inf, -1.0, 0.0, 0.5, 0.5, 2.0]), max_size=40),
    k=st.integers(1, 12),
)
def test_select_breaks_ties_by_document_number(scores: list[float], k: int) -> None:
    array = np.array(scores, dtype=np.float32)
    expected = sorted((-s, n) for n, s in enumerate(scores) if s > -1e9)[:k]
    assert [int(n) for n in select(array, k)] == [n for _, n in expected]


def test_nobody_votes() -> None:
    msa = MsaConfig(routed_layers=(0,))
    q_THD = torch.randn(3, HEADS, HEAD_DIM)
    assert prepare(q_THD, torch.zeros(3, dtype=torch.bool), KV_HEADS, msa, k=4) is None
    last = MsaConfig(routed_layers=(0,), query_reduce=QueryReduce.LAST)
    votes_T = torch.tensor([True, True, False])
    assert prepare(q_THD, votes_T, KV_HEADS, last, k=4, last=2) is None
    assert prepare(q_THD, votes_T, KV_HEADS, last, k=4, last=-1) is None


def test_the_benchmark_compares_like_with_like() -> None:
    command = [sys.executable, "-m", "benchmarks.routing", "--json", "--chunks", "1500"]
    root = Path(__file__).parents[2]
    ran = subprocess.run(
        [*command, "--repeats", "1"], cwd=root, capture_output=True, text=True, check=True
    )
    results = json.loads(ran.stdout)["results"]
    assert [result["dtype"] for result in results] == ["float32", "bfloat16"]
    assert all(result["same_top_k"] for result in results)
