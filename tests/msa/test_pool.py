"""Rows in one pool: the same tokens as rows that attend alone, and no row sees another."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_adapter.engine import Event, Generate, TextEvent
from model_adapter.msa import decode_step
from model_adapter.msa.decode_step import PooledRows, Way
from model_adapter.msa.engine import MsaEngine, limits_of
from model_adapter.msa.forward import Attend, Segment, new_row, run
from model_adapter.msa.interleave import InterleaveSession
from model_adapter.msa.kvcache import KVCache
from model_adapter.msa.pool import NOBODYS, FreeRuns, KVPool, PooledCache
from model_adapter.msa.prompt import Answering
from tests.support.tiny_msa import answer, finish, remember, tiny_engine, tiny_model

CPU = torch.device("cpu")
QUESTION = "who was born in the old city?"
BOTH = pytest.mark.parametrize("answering", list(Answering))


def pooled_engine(answering: Answering = Answering.INTERLEAVE, answer_tokens: int = 0) -> MsaEngine:
    model = tiny_model(answering)
    limits = limits_of(model)
    if answer_tokens:
        limits = replace(limits, answer_tokens=answer_tokens)
    return MsaEngine(model, limits=limits, pooled=Way.PADDED)


def text_of(events: Sequence[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextEvent))


@BOTH
def test_pooled_rows_write_the_same_tokens(answering: Answering) -> None:
    alone, pooled = tiny_engine(answering), pooled_engine(answering)
    memory, other = remember(alone), remember(alone, {5: "Boats of the north."})
    requests = [
        (Generate(QUESTION, 40), memory),
        (Generate("Which garden?", 9, top_k=1), other),
        (Generate("x", 11, temperature=0.9, top_p=0.8, seed=7), memory),
        (Generate("The captain?", 5, top_k=40), memory),
    ]
    expected = [answer(alone, request, view) for request, view in requests]
    together = finish(pooled, *(pooled.start(request, view) for request, view in requests))
    for place, events in enumerate(expected):
        assert text_of(together[place]) == text_of(events)
        assert together[place][-1] == events[-1]


def test_what_a_step_gives_is_what_a_pass_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Filled-up batches, several sizes, rows that come and go: to the same logits."""
    monkeypatch.setattr(decode_step, "BUCKETS", (1, 4))
    plain, pooled = tiny_engine()._model.decoder, pooled_engine()._model.decoder
    with torch.inference_mode():
        rows = [(new_row(plain), new_row(pooled)) for _ in range(3)]
        for place, (one, other) in enumerate(rows):
            ids = [7 + place] * (3 + 4 * place)
            run(plain, [Segment(one, ids)])
            run(pooled, [Segment(other, ids)])
        for turn in range(6):
            going = rows[: 1 + turn % 3] if turn < 4 else rows[1:]
            ours = run(pooled, [Segment(other, [turn + 2]) for _, other in going]).logits
            theirs = run(plain, [Segment(one, [turn + 2]) for one, _ in going]).logits
            assert ours is not None and theirs is not None
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
            assert [one.position for one, _ in going] == [other.position for _, other in going]


def test_more_rows_than_a_step_takes_go_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_step, "BUCKETS", (1,))
    plain, pooled = tiny_engine()._model.decoder, pooled_engine()._model.decoder
    with torch.inference_mode():
        ours = [new_row(pooled) for _ in range(2)]
        theirs = [new_row(plain) for _ in range(2)]
        for ids in ([4, 5, 6], [9]):
            found = run(pooled, [Segment(row, ids) for row in ours]).logits
            wanted = run(plain, [Segment(row, ids) for row in theirs]).logits
            assert found is not None and wanted is not None
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
        ghost = run(pooled, [Segment(ours[0], [3], attend=Attend.GHOST)]).logits
        wanted = run(plain, [Segment(theirs[0], [3], attend=Attend.GHOST)]).logits
        assert ghost is not None and wanted is not None
        torch.testing.assert_close(ghost, wanted, atol=1e-4, rtol=1e-4)


@settings(max_examples=10, deadline=None)
@given(
    steps=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 90)), min_size=1, max_size=14),
    dropped=st.sets(st.integers(0, 3), max_size=2),
)
def test_a_pool_holds_what_was_appended_whoever_grows_or_leaves(
    steps: list[tuple[int, int]], dropped: set[int]
) -> None:
    config = tiny_model().config
    pool = KVPool(config, torch.float32, CPU, positions=150)
    pooled = {row: PooledCache(pool) for row in range(4)}
    plain = {row: KVCache(config, torch.float32, CPU) for row in range(4)}
    for turn, (row, count) in enumerate(steps):
        part = torch.randn(count, config.num_kv_heads, config.head_dim)
        if row in pooled:
            pooled[row].append(turn % 2, part, -part)
            plain[row].append(turn % 2, part, -part)
        if turn == len(steps) // 2:
            for gone in dropped:
                pooled.pop(gone)
    for row, cache in pooled.items():
        for layer in (0, 1):
            assert cache.length(layer) == plain[row].length(layer)
            for ours, theirs in zip(cache.read(layer), plain[row].read(layer), strict=True):
                assert torch.equal(ours, theirs)
    pooled.clear()
    del cache
    gc.collect()
    for layer, store in enumerate(pool.layers):
        assert pool.free(layer) == store.shape[1] - 1, "all but nobody's position"
        assert not store.any(), "what rows leave is zeroed"


@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.randoms())
def test_free_runs_are_taken_once_and_join(sizes: list[int], random: object) -> None:
    runs = FreeRuns(1, 101)
    taken: list[tuple[int, int]] = []
    for size in sizes:
        start = runs.take(size)
        if start is not None:
            assert all(start + size <= first or start >= stop for first, stop in taken)
            taken.append((start, start + size))
    assert runs.free == 100 - sum(stop - first for first, stop in taken)
    getattr(random, "shuffle")(taken)  # noqa: B009  # hypothesis gives it no type
    for run_ in taken:
        runs.give(*run_)
    assert runs.take(100) == 1


def test_a_cancelled_answer_leaves_its_room() -> None:
    engine = pooled_engine()
    memory = remember(engine)
    rows = engine._model.decoder.rows
    assert isinstance(rows, PooledRows)
    before = [rows.pool.free(layer) for layer in range(len(rows.pool.layers))]
    session = engine.start(Generate(QUESTION, 30), memory)
    assert isinstance(session, InterleaveSession)
    for _ in range(4):
        engine.step([session])
    assert rows.pool.free(0) < before[0]
    del session
    gc.collect()
    assert [rows.pool.free(layer) for layer in range(len(rows.pool.layers))] == before


def test_nothing_is_left_of_rows_that_are_gone() -> None:
    engine = pooled_engine()
    memory = remember(engine)
    rows = engine._model.decoder.rows
    assert isinstance(rows, PooledRows)
    prefix = [layer.abs().sum().item() for layer in rows.pool.layers]
    session = engine.start(Generate(QUESTION, 30), memory)
    for _ in range(4):
        engine.step([session])
    answering = [layer.abs().sum().item() for layer in rows.pool.layers]
    assert all(more > before for more, before in zip(answering, prefix, strict=True))
    # Batches that are filled up have written here.
    nobodys = [layer[:, NOBODYS].abs().sum().item() for layer in rows.pool.layers]
    del session
    engine.settle()
    left = [layer.abs().sum().item() for layer in rows.pool.layers]
    assert left == pytest.approx([a + b for a, b in zip(prefix, nobodys, strict=True)])


def test_a_row_does_not_know_its_neighbours_bit_for_bit() -> None:
    """Of one size of batch: what fills it up, rows or nobody, changes no bit."""
    engine = pooled_engine()
    decoder = engine._model.decoder
    assert decoder.rows is not None
    step = decode_step.DecodeStep(decoder, decoder.rows.pool, 4, Way.PADDED)
    found = []
    with torch.inference_mode():
        for neighbours in (0, 3):
            caches = [PooledCache(decoder.rows.pool) for _ in range(1 + neighbours)]
            for turn in range(5):
                tokens = [turn + 2 + 5 * row for row in range(len(caches))]
                logits_RV = step.run(caches, tokens, [turn] * len(caches))
            found.append(logits_RV[0].clone())
    assert torch.equal(*found)


def test_a_chat_begins_with_what_was_run_once() -> None:
    loaded = tiny_model(Answering.ROUTED_TEXT)
    template = replace(loaded.template, system="Answer.", documents_before="Texts:\n")
    model = MsaEngine(replace(loaded, template=template))._model
    opening = model.prompts.chat_opening()
    turn = model.prompts.chat([[5, 6, 7]], "boat?")
    assert len(opening) > 3 and turn[: len(opening)] == opening
    with torch.inference_mode():
        row, rest = model.chat_row(turn)
        assert row.position == len(opening) and opening + rest == turn
        ours = run(model.decoder, [Segment(row, rest)]).logits
        theirs = run(model.decoder, [Segment(new_row(model.decoder), turn)]).logits
    assert ours is not None and theirs is not None
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    other, whole = model.chat_row(model.prompts.chat([], "boat?"))
    assert other.position == 0 and whole == model.prompts.chat([], "boat?")
    assert not tiny_engine()._model.opening, "an interleaving model has no chat"
