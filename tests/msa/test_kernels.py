"""The fused routing kernels against their twin, and the twin against the engine's routing.

Without a GPU the kernels run in Triton's interpreter, which computes bf16 products wrongly
(a known limit), so floats are fp32 and fp16 here; on a GPU bf16 is compared as well.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_adapter.msa import kernels
from model_adapter.msa.config import ChunkReduce, QueryReduce
from model_adapter.msa.kernels import KeyFormat, Plan, RoutingKeys, Rows, Spans, twin
from model_adapter.msa.kernels.keys import INT8_MAX, MOST_GROUP, floats
from model_adapter.msa.kernels.launches import questions_at_once
from model_adapter.msa.kernels.plan import TILE_CHUNKS
from model_adapter.msa.kernels.rows import MOST_ROWS
from model_adapter.msa.routing import RoutingQuery, score_chunks, select

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels' module is imported
pytest.importorskip("triton", reason="the kernels need triton, a part of the dev requirements")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GROUP = 32
FLOATS = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE.type == "cuda" else [])


@dataclass(frozen=True)
class Case:
    """Memories of random keys with questions over each of them."""

    spans: list[Spans]
    keys: list[torch.Tensor]
    questions: list[list[torch.Tensor]]

    def plan(self) -> Plan:
        return Plan.of(self.spans, [len(asked) for asked in self.questions])

    def flat(self) -> list[torch.Tensor]:
        return [question for asked in self.questions for question in asked]


def offsets(lengths: Sequence[int]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)


def make(
    lengths: Sequence[Sequence[int]],
    tokens: Sequence[Sequence[int]],
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    width: int = 64,
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    keys = [
        torch.randn(sum(counts), width, generator=generator).to(dtype).to(DEVICE)
        for counts in lengths
    ]
    questions = [
        [torch.randn(count, width, generator=generator).to(DEVICE) for count in asked]
        for asked in tokens
    ]
    return Case([Spans.of(offsets(counts), DEVICE) for counts in lengths], keys, questions)


def both(case: Case, quantised: list[RoutingKeys]) -> tuple[torch.Tensor, torch.Tensor]:
    rows = Rows.of(case.flat(), quantised[0])
    plan = case.plan()
    return (
        kernels.score(plan, quantised, rows, fused=True),
        kernels.score(plan, quantised, rows, fused=False),
    )


def formulas(case: Case) -> list[torch.Tensor]:
    """Scores [B, N] of each memory by the engine's own routing."""
    found = []
    for spans, keys_CE, asked in zip(case.spans, case.keys, case.questions, strict=True):
        rows = []
        for question_QE in asked:
            query = RoutingQuery(question_QE, None, 1, QueryReduce.MAX, ChunkReduce.MAX)
            scores_N = torch.full((spans.documents,), -torch.inf, device=DEVICE)
            rows.append(
                scores_N.scatter_reduce_(
                    0, spans.document_C.long(), score_chunks(query, keys_CE), "amax"
                )
            )
        found.append(torch.stack(rows))
    return found


@pytest.mark.parametrize("dtype", FLOATS)
def test_float_keys_score_as_the_engine_does(dtype: torch.dtype) -> None:
    case = make([[1, 3, 2, 7, 1], [5]], [[4, 17], [1]], dtype)
    fused, plain = both(case, [floats(keys, GROUP) for keys in case.keys])
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-4)
    for ours, formula in zip(case.plan().split(plain), formulas(case), strict=True):
        torch.testing.assert_close(ours, formula, rtol=2e-4, atol=2e-3)


@pytest.mark.parametrize("to", [KeyFormat.INT8, KeyFormat.INT4])
def test_integer_keys_score_as_their_dequantised_values(to: KeyFormat) -> None:
    case = make([[2, 1, 4], [1, 1], [9, 3]], [[3], [2, 20, 1], [5, 5]])
    quantised = [kernels.quantise(keys, to, GROUP) for keys in case.keys]
    fused, plain = both(case, quantised)
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-4)
    rounded = Case(case.spans, [keys.dequantised() for keys in quantised], case.questions)
    for ours, formula in zip(case.plan().split(fused), formulas(rounded), strict=True):
        # The question is rounded to 16 bits, the keys are what they are.
        torch.testing.assert_close(ours, formula, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("to", [KeyFormat.FLOAT, KeyFormat.INT4])
def test_a_document_longer_than_a_tile_has_one_score(to: KeyFormat) -> None:
    case = make([[3, 2 * TILE_CHUNKS + 5, 1, TILE_CHUNKS], [TILE_CHUNKS + 1]], [[2], [3, 1]])
    quantised = [kernels.quantise(keys, to, GROUP) for keys in case.keys]
    fused, plain = both(case, quantised)
    assert torch.isfinite(fused).all()
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("to", "dtype"),
    [*((KeyFormat.FLOAT, dtype) for dtype in FLOATS), (KeyFormat.INT8, torch.float32)],
)
def test_a_question_of_more_tokens_than_a_program_takes(to: KeyFormat, dtype: torch.dtype) -> None:
    tokens = [[MOST_ROWS + 3, 2, MOST_ROWS], [2 * MOST_ROWS + 1]]
    case = make([[1, 3, 2], [TILE_CHUNKS + 2]], tokens, dtype)
    fused, plain = both(case, [kernels.quantise(keys, to, GROUP) for keys in case.keys])
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("asked", [[16, 3, 9], [2] * 9])
def test_as_many_rows_at_once_as_there_are_kernels_for(asked: list[int]) -> None:
    case = make([[1, 3, 120, 9, 2, 127, 5], [2]], [asked, [1]], torch.float16)
    keys = [floats(held, GROUP) for held in case.keys]
    assert questions_at_once(keys[0], 16, len(asked)) == (8 if len(asked) == 3 else 16)
    fused, plain = both(case, keys)
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("group", [16, 64])
@pytest.mark.parametrize("to", [KeyFormat.INT8, KeyFormat.INT4])
def test_groups_of_fewer_dimensions_than_matrix_units_take(to: KeyFormat, group: int) -> None:
    case = make([[2, 1, 4], [6]], [[3], [5]])
    fused, plain = both(case, [kernels.quantise(keys, to, group) for keys in case.keys])
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-4)


def test_every_chunk_is_in_exactly_one_tile() -> None:
    rng = np.random.default_rng(3)
    lengths = rng.integers(1, 3 * TILE_CHUNKS, size=200)
    where = offsets([int(length) for length in lengths])
    tiles = Spans.of(where, torch.device("cpu")).tiles_T3.tolist()
    covered = [chunk for first, count, _ in tiles for chunk in range(first, first + count)]
    assert covered == list(range(int(where[-1])))
    assert all(0 < count <= TILE_CHUNKS for _, count, _ in tiles)
    for first, count, shared in tiles:
        if not shared:  # whole documents only
            assert {first, first + count} <= set(where.tolist())


@settings(max_examples=5, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=12), min_size=1, max_size=4),
    tokens=st.lists(st.lists(st.integers(1, 18), min_size=1, max_size=3), min_size=4, max_size=4),
    to=st.sampled_from(list(KeyFormat)),
    seed=st.integers(0, 99),
)
def test_any_mixture_of_memories_scores_as_each_alone(
    lengths: list[list[int]], tokens: list[list[int]], to: KeyFormat, seed: int
) -> None:
    case = make(lengths, tokens[: len(lengths)], seed=seed)
    quantised = [kernels.quantise(keys, to, GROUP) for keys in case.keys]
    fused, plain = both(case, quantised)
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-4)
    together = case.plan().split(fused)
    for index, part_BN in enumerate(together):
        alone = Case([case.spans[index]], [case.keys[index]], [case.questions[index]])
        alone_BN, _ = both(alone, [quantised[index]])
        torch.testing.assert_close(part_BN.flatten(), alone_BN, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("documents", [1, 5, 2048, 5000])
@pytest.mark.parametrize("fused", [True, False])
def test_the_best_are_those_of_the_engine_with_ties_to_the_first(
    documents: int, fused: bool
) -> None:
    generator = torch.Generator().manual_seed(documents)
    # Few values, so that most scores have equals; zeros of both signs are equal too.
    scores_BN = torch.randint(-4, 4, (3, documents), generator=generator).float() / 2
    scores_BN[:, ::7] = -0.0
    found = kernels.best(scores_BN.to(DEVICE), 16, fused=fused)
    for row, scores_N in enumerate(scores_BN):
        assert found.documents_BK[row].tolist() == select(scores_N.numpy(), 16).tolist()
    torch.testing.assert_close(
        found.scores_BK.cpu(), scores_BN.gather(1, found.documents_BK.cpu()), rtol=0, atol=0
    )


@pytest.mark.parametrize("k", [1, 32, 40, 300])
def test_any_number_of_the_best_of_memories_of_any_size(k: int) -> None:
    """Chosen by one program, merged, sorted behind the kernel, and sorted at once."""
    case = make([[1] * 5000, [2], [1] * 4096], [[2], [1, 3], [2]], width=32)
    plan = case.plan()
    scores = torch.randint(-9, 9, (plan.size,), generator=torch.Generator().manual_seed(k)) / 2
    for _ in range(2):  # what a launch leaves behind does for the next
        ours = kernels.best_keys(plan, scores.to(DEVICE), k, fused=True)
        assert torch.equal(ours, kernels.best_keys(plan, scores.to(DEVICE), k, fused=False))


def test_two_stages_find_what_one_exact_pass_finds() -> None:
    rng = np.random.default_rng(5)
    lengths = [int(length) for length in rng.integers(1, 5, size=400)]
    case = make([lengths], [[3, 8]])
    coarse = kernels.quantise(case.keys[0], KeyFormat.INT4, GROUP)
    found = kernels.two_stage(
        case.spans[0], offsets(lengths), coarse, case.keys[0].cpu(), case.flat(), k=16, survivors=64
    )
    for row, scores_N in enumerate(formulas(case)[0]):
        assert found.documents_BK[row].tolist() == select(scores_N.cpu().numpy(), 16).tolist()


def test_few_survivors_lose_documents() -> None:
    """What makes the test above one that can fail: 4 bits alone choose otherwise."""
    case = make([[1] * 400], [[3]])
    coarse = kernels.quantise(case.keys[0], KeyFormat.INT4, GROUP)
    rough = kernels.score(case.plan(), [coarse], Rows.of(case.flat(), coarse))
    exact_N = formulas(case)[0][0].cpu().numpy()
    assert select(rough.cpu().numpy(), 16).tolist() != select(exact_N, 16).tolist()


@pytest.mark.parametrize("to", [KeyFormat.INT8, KeyFormat.INT4])
def test_quantising_stays_within_half_a_step(to: KeyFormat) -> None:
    keys_CE = torch.randn(50, 64) * torch.logspace(-3, 3, 50)[:, None]
    quantised = kernels.quantise(keys_CE, to, GROUP)
    assert quantised.scale_CS is not None
    step_CE = quantised.scale_CS.repeat_interleave(GROUP, dim=1)
    assert ((quantised.dequantised() - keys_CE).abs() <= step_CE * 0.5001).all()
    assert quantised.values_CE.nbytes == keys_CE.numel() // (1 if to is KeyFormat.INT8 else 2)


def test_zero_keys_quantise_to_zeros() -> None:
    for to in (KeyFormat.INT8, KeyFormat.INT4):
        assert not kernels.quantise(torch.zeros(3, 64), to, GROUP).dequantised().any()


@pytest.mark.parametrize("group", [0, 24, 128])
def test_groups_must_divide_the_width(group: int) -> None:
    with pytest.raises(ValueError, match="whole groups"):
        kernels.quantise(torch.zeros(2, 64), KeyFormat.INT8, group)


def test_a_group_is_no_larger_than_its_products_fit() -> None:
    """The largest ones, too: nothing overflows."""
    product = INT8_MAX * INT8_MAX
    assert (2 * INT8_MAX + 1) * product * MOST_GROUP < 1 << 31
    ones_CE = torch.ones(3, MOST_GROUP, device=DEVICE)
    keys = kernels.quantise(ones_CE, KeyFormat.INT8, MOST_GROUP)
    case = Case([Spans.of(offsets([3]), DEVICE)], [ones_CE], [[ones_CE[:1]]])
    fused, _ = both(case, [keys])
    assert fused.tolist() == [pytest.approx(MOST_GROUP)]
    with pytest.raises(ValueError, match="may share one"):
        kernels.quantise(torch.ones(2, 2 * MOST_GROUP), KeyFormat.INT8, 2 * MOST_GROUP)


def test_order_keys_sort_as_scores_do() -> None:
    scores_BN = torch.tensor([[0.0, -0.0, -1.5, float("-inf"), 3.0, 3.0, 1e-30]])
    order = twin.order_keys(scores_BN)[0].argsort(descending=True)
    assert order.tolist() == [4, 5, 6, 0, 1, 2, 3]


def test_the_kernels_compile_for_a_gpu() -> None:
    """For Hopper, without one: what the interpreter does not see."""
    own = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.compile_kernels"]
    done = subprocess.run(command, env=own, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
