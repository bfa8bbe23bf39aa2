"""What only a GPU can show: run by `scripts/gpu-shows OUT check`, skipped elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import models
from benchmarks.generate import remembered
from model_adapter.carrying import Carrier
from model_adapter.content import HeldContent
from model_adapter.content_pool import ContentPool
from model_adapter.engine import DocumentText, Event, Generate, TextEvent
from model_adapter.fetching import Fetcher
from model_adapter.msa.config import LoadedModel
from model_adapter.msa.decode_step import Way
from model_adapter.msa.encode import TokenisedDocument, batches, encode_batch, from_bits
from model_adapter.msa.engine import MsaEngine
from model_adapter.msa.kernel_choice import RoutingKeyChoice, choose
from model_adapter.staging import CudaLane, Staging
from storage.layout import KVLayout
from storage.paths import DataFolder
from tests.support.tiny_msa import answer, finish

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = torch.device("cuda")


def text_of(events: Sequence[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextEvent))


def loaded(shape: str = "135m") -> LoadedModel:
    return models.load(f"random:{shape}", DataFolder(Path()), "bf16", GPU)


def engine_of(keys: RoutingKeyChoice, way: Way | None = None) -> MsaEngine:
    model = loaded()
    routing = choose(keys, model.config, model.compute_dtype, GPU)
    return MsaEngine(model, "cuda", routing=routing, pooled=way)


@pytest.mark.parametrize("keys", list(RoutingKeyChoice))
def test_a_worker_takes_the_fast_ways(keys: RoutingKeyChoice) -> None:
    said = engine_of(keys).description.placement
    assert "Triton kernels" in said and "CUDA graphs" in said, said


@pytest.mark.parametrize("way", [Way.GRAPHS, Way.FLASH])
def test_rows_together_step_as_alone(way: Way) -> None:
    """Random bf16 weights part at a near tie: most tokens agree, not every one."""
    engine = engine_of(RoutingKeyChoice.AUTO, way)
    view = remembered(engine, 40, GPU)
    requests = [Generate(f"Which thing did Emil lose? ({n})", 24) for n in range(5)]
    alone = [text_of(answer(engine, request, view)) for request in requests]
    together = finish(engine, *(engine.start(request, view) for request in requests))
    same = [text_of(together[n])[:20] == text[:20] for n, text in enumerate(alone)]
    assert sum(same) >= 3


def test_a_pool_that_grows_captures_anew() -> None:
    engine = engine_of(RoutingKeyChoice.AUTO, Way.GRAPHS)
    rows = engine._model.decoder.rows
    assert rows is not None
    view = remembered(engine, 40, GPU)
    before = rows.pool.generation
    sessions = [engine.start(Generate(f"Who has a beehive? ({n})", 200), view) for n in range(24)]
    finish(engine, *sessions)
    assert rows.pool.generation > before
    again = [text_of(answer(engine, Generate("Who has a beehive?", 24), view)) for _ in range(2)]
    assert again[0] and again[0] == again[1]


def test_packed_documents_make_the_blocks_that_padded_ones_do() -> None:
    engine = engine_of(RoutingKeyChoice.AUTO)
    decoder, prompts = engine._model.decoder, engine._model.prompts
    texts = {n: "the old bridge " * (1 + 7 * n) for n in range(1, 9)}
    packed = {
        block.number: block
        for block in engine.encode([DocumentText(n, text) for n, text in texts.items()]).blocks
    }
    for n, text in texts.items():
        with torch.inference_mode():
            alone = TokenisedDocument(n, prompts.document(n, text))
            (block,) = encode_batch(decoder, next(batches([alone])))
        ours, theirs = from_bits(packed[n].value_LCE), from_bits(block.value_LCE)
        difference = (ours.float() - theirs.float()).norm() / theirs.float().norm()
        assert difference < 0.02


def test_staging_and_fetching_bring_every_bit() -> None:
    source = torch.randn(3, 1000, 64).bfloat16()
    target = torch.zeros_like(source, device=GPU)
    staging = Staging(CudaLane(GPU), 1 << 14)
    for first in range(0, 1000, 130):
        staging.copy(target[:, first : first + 130], source[:, first : first + 130])
    staging.finish()
    assert torch.equal(target.cpu(), source)
    words = source.view(torch.int16).numpy()
    carrier, random = Carrier(GPU), np.random.default_rng(1)
    for parts in (1, 3, 60, 2, 900, 5, 7, 1):
        layers, firsts = random.integers(0, 3, parts), random.integers(0, 990, parts)
        places_R = random.integers(0, 1000, 9 * parts)
        given = [words[layer, n : n + 9] for layer, n in zip(layers, firsts, strict=True)]
        values_RE, there_R = carrier(given, places_R, torch.bfloat16)
        expected = torch.from_numpy(np.concatenate(given)).view(torch.bfloat16)
        assert torch.equal(values_RE.cpu(), expected) and there_R.tolist() == places_R.tolist()
    carrier.wipe()
    assert not any(buffer.any() for buffer, _ in carrier._ring)


def test_a_kernel_fetches_what_lies_on_both_sides() -> None:
    layout = KVLayout((0, 1, 2), 2, 32, 4, "bf16", separate_routing_keys=True)
    fetcher = Fetcher.of(GPU, layout)
    assert fetcher is not None
    made = [torch.randn(2, 3, chunks, 64).bfloat16() for chunks in (1, 700, 3)]
    pool = ContentPool(1 << 22, fetcher.memory)
    places = [pool.take(each.nbytes) for each in made]
    held = [
        HeldContent(*each).copied(place)
        for each, place in zip(made, places, strict=True)
        if place is not None
    ]
    assert len(held) == 3
    there_LCE = torch.cat([each[0] for each in made], dim=1).to(GPU)
    chunks_n = np.array([1, 700, 3])
    firsts_n = np.cumsum(chunks_n) - chunks_n
    table_n = there_LCE.data_ptr() + firsts_n * fetcher.row_bytes
    steps_n = np.full(3, there_LCE.stride(0) * 2)
    pooled_n = np.array([content.addresses for content in held]).T
    for keys_R2 in (fetcher.rows(table_n, chunks_n, steps_n), fetcher.rows(pooled_n[0], chunks_n)):
        chosen = fetcher.select([0, 1, 2], keys_R2, fetcher.rows(pooled_n[1], chunks_n), held, 0)
        for layer in (0, 2, 1, 2):
            found = torch.stack(fetcher(chosen, layer)).cpu()
            assert torch.equal(found, torch.cat([each[:, layer] for each in made], dim=1))
    for content in held:
        content.wipe()
    assert not any(place.memory.any() for place in places if place is not None)
