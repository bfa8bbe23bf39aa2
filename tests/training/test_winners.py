"""Gathered gradients against those that autograd makes of the plain formulas."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_adapter.msa.encode import Pooling
from model_adapter.training.winners import NEVER, best_scores, take_slots

seeds = st.integers(0, 10_000)


def _gradients(value: torch.Tensor, *of: torch.Tensor, seed: int) -> list[torch.Tensor]:
    given_ = torch.randn(value.shape, generator=torch.Generator().manual_seed(seed + 1))
    return list(torch.autograd.grad(value, of, given_))


@settings(max_examples=25, deadline=None)
@given(seed=seeds, queries=st.integers(1, 5), documents=st.integers(1, 6))
def test_best_scores_are_maxima_with_their_gradients(
    seed: int, queries: int, documents: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, 4, (documents,), generator=generator)
    starts = counts.cumsum(0) - counts
    place = torch.arange(3)[None, :]
    chunks_DX = torch.where(place < counts[:, None], starts[:, None] + place, starts[:, None])
    query = torch.randn(queries, 4, 6, generator=generator, requires_grad=True)
    keys = torch.randn(int(counts.sum()) + 2, 6, generator=generator, requires_grad=True)
    votes = torch.arange(4)[None, :] < torch.randint(1, 5, (queries, 1), generator=generator)

    found = best_scores(query, votes, keys, chunks_DX)
    plain = (query.flatten(0, 1) @ keys.T).view(queries, 4, -1)
    plain = plain.masked_fill(~votes[:, :, None], NEVER).max(1).values[:, chunks_DX].max(2).values
    torch.testing.assert_close(found, plain)
    for ours, theirs in zip(
        _gradients(found, query, keys, seed=seed),
        _gradients(plain, query, keys, seed=seed),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@settings(max_examples=25, deadline=None)
@given(seed=seeds, lengths=st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_slots_take_rows_and_give_their_gradients_back(seed: int, lengths: list[int]) -> None:
    """One token before every query, and one behind all of them, vote nowhere."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.tensor(lengths)
    starts = (count + 1).cumsum(0) - count
    place = torch.arange(int(count.max()))[None, :]
    votes = place < count[:, None]
    slots = torch.where(votes, starts[:, None] + place, starts[:, None])
    rows = torch.randn(int((count + 1).sum()) + 1, 3, generator=generator, requires_grad=True)
    place_T = torch.full((len(rows),), slots.numel())
    place_T[slots[votes]] = torch.arange(slots.numel())[votes.flatten()]

    found = take_slots(rows, slots, place_T)
    assert torch.equal(found, rows[slots])
    # Repeated slots are masked by who reads them.
    ours = _gradients(found * votes[:, :, None], rows, seed=seed)[0]
    theirs = _gradients(rows[slots] * votes[:, :, None], rows, seed=seed)[0]
    torch.testing.assert_close(ours, theirs)


@settings(max_examples=25, deadline=None)
@given(seed=seeds, lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_ordered_pooling_is_pooling(seed: int, lengths: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(sum(lengths), 2, 3, generator=generator, requires_grad=True)
    cpu = torch.device("cpu")
    plain = Pooling(lengths, 16, cpu).mean(rows)
    ordered = Pooling(lengths, 16, cpu, ordered=True).mean(rows)
    torch.testing.assert_close(ordered, plain)
    torch.testing.assert_close(
        _gradients(ordered, rows, seed=seed)[0], _gradients(plain, rows, seed=seed)[0]
    )
    half = rows.detach().bfloat16()
    torch.testing.assert_close(
        Pooling(lengths, 16, cpu, ordered=True).mean(half), Pooling(lengths, 16, cpu).mean(half)
    )
