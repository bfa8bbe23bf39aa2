"""Routing keys as kernels read them: what a lease lends, in each precision, within budgets."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model_adapter.engine import ModelDescription
from model_adapter.msa.kernels import Batch, KeyFormat, KeyStorage, ResidentKeys, Rows
from model_adapter.pager import Budgets
from model_adapter.placement import routing_budget
from model_adapter.tensors import as_tensor
from storage.layout import KVLayout
from tests.support.blocks import SEPARATE, SHARED
from tests.support.pages import TENANT, World, document_bytes, joined, key
from tests.support.pages import bits as page_bits

CPU = torch.device("cpu")
ROOMY = Budgets(1 << 22, 1 << 20, slab_bytes=300)
STORAGES = [
    KeyStorage(),
    KeyStorage(KeyFormat.INT8, 8),
    KeyStorage(KeyFormat.INT4, 8),
    KeyStorage(KeyFormat.INT4, 8, exact=True),
]
TOKENS = [1, 5, 64, 65, 3, 200, 8, 1, 1, 17, 130, 2]


def filled(layout: KVLayout) -> World:
    """Documents that came one by one: several segments."""
    world = World(layout, ROOMY)
    for number, tokens in enumerate(TOKENS, 1):
        world.write(key(1), [number], tokens)
    return world


def scores(resident: ResidentKeys, layer: int, width: int) -> torch.Tensor:
    question_QE = torch.randn(3, width, generator=torch.Generator().manual_seed(1))
    batch = Batch.of([resident], [1])
    rows = Rows.of([question_QE], batch.stacks[0].layer(layer))
    return batch.score(layer, rows, fused=False)


@pytest.mark.parametrize("storing", STORAGES, ids=["float", "int8", "int4", "two-stage"])
@pytest.mark.parametrize("layout", [SHARED, SEPARATE], ids=["shared", "separate"])
def test_a_lease_lends_the_keys_that_were_written(layout: KVLayout, storing: KeyStorage) -> None:
    world = filled(layout)
    pager = world.new_pager(ROOMY, storing)
    for last in (2, 7, 12, 9):  # grows, and is then read as of an earlier document
        with pager.lease(key(1), last, 0) as view:
            resident = view.resident_keys()
            assert resident is not None and resident.documents == last
            written = [world.blocks[key(1)][number] for number in range(1, last + 1)]
            for layer in range(len(layout.routed_layers)):
                bits = np.concatenate([block.routing_key_LCE for block in written], axis=1)
                keys_LCE = as_tensor(bits, layout)
                whole = ResidentKeys.of(view.chunk_offsets_N1, keys_LCE, storing, CPU)
                expected = scores(whole, layer, layout.width)
                torch.testing.assert_close(scores(resident, layer, layout.width), expected)
                if storing.exact:
                    some = np.array([0, last - 1])
                    offsets_n1, (exact_cE,) = resident.exact([layer], some)
                    wanted = [written[n].routing_key_LCE[layer] for n in some]
                    assert offsets_n1.tolist() == np.cumsum([0, *map(len, wanted)]).tolist()
                    assert torch.equal(exact_cE, as_tensor(np.concatenate(wanted), layout))
            if storing.format is KeyFormat.FLOAT or storing.exact:
                world.check(view, key(1), last)
            else:  # content is exact however coarse the routing keys are
                key_CE, _ = view.content(0, [1, 0])
                swapped = [written[1], written[0]]
                assert (page_bits(key_CE) == joined(swapped, "key", 0, layout)).all()
                (first, keys_CE), *_ = view.routing_keys(0)
                assert first == 0 and keys_CE.dtype is torch.float32
            assert storing.format is not KeyFormat.FLOAT or last < 12 or len(resident.parts) > 1
        pager.check_integrity()


def test_who_reads_the_same_reads_the_same_keys() -> None:
    """So that questions over one memory are scored by one pass over it."""
    world = filled(SHARED)
    pager = world.new_pager(ROOMY, STORAGES[0])
    with pager.lease(key(1), 9, 0) as one, pager.lease(key(1), 9, 0) as other:
        assert one.resident_keys() is other.resident_keys() is not None
        with pager.lease(key(1), 5, 0) as before, pager.lease(key(1), 12, 0) as more:
            for view, documents in ((before, 5), (more, 12), (one, 9)):
                resident = view.resident_keys()
                assert resident is not None and resident.documents == documents


def test_a_memory_over_the_budget_is_routed_by_slabs() -> None:
    world = filled(SEPARATE)
    pager = world.new_pager(Budgets(3 * document_bytes(SEPARATE, 65), 0), STORAGES[0])
    with pager.lease(key(1), 12, 0) as view:
        assert view.resident_keys() is None
        world.check(view, key(1), 12)
    with world.pager.lease(key(1), 12, 0) as view:
        assert view.resident_keys() is None, "nobody asked for kernels"


@pytest.mark.parametrize("storing", STORAGES[1:])
def test_coarse_keys_take_less_and_are_overwritten(storing: KeyStorage) -> None:
    world = filled(SEPARATE)
    pager = world.new_pager(ROOMY, storing)
    with pager.lease(key(1), 12, 0) as view:
        segments = view._segments
    world.pager.lease(key(1), 12, 0).release()
    taken, plain = (one.residency().routing_bytes for one in (pager, world.pager))
    per_chunk = SEPARATE.width * (1 if storing.format is KeyFormat.INT8 else 0.5) + 4 * 2
    assert taken == plain * per_chunk / (SEPARATE.width * 2)
    held = [tensor for segment in segments for tensor in segment.tensors()]
    assert all(tensor.any() for tensor in held[:2])
    assert pager.evict(TENANT) == taken
    assert not any(tensor.any() for tensor in held)


def described(storing: KeyStorage | None) -> ModelDescription:
    return ModelDescription("m", "m", "00", SEPARATE, 9, 9, 9, "cpu", "bf16", storing=storing)


def test_the_budget_is_what_was_asked_and_what_the_host_can_hold() -> None:
    plain, two_stage = described(STORAGES[0]), described(STORAGES[3])
    assert routing_budget(plain, CPU, 5 << 20, 0)[0] == 5 << 20
    assert routing_budget(plain, CPU, None, 0)[0] == 1 << 30
    # 16 dimensions: 32 bytes exact, 8 and two scales of 4 coarse.
    budget, why = routing_budget(two_stage, CPU, 1 << 30, 64 << 20)
    assert budget == (64 << 20) // 2 and "host RAM" in why
    assert routing_budget(two_stage, CPU, 1 << 20, 64 << 20)[0] == 1 << 20


def test_a_model_of_other_reductions_is_told_why() -> None:
    from model_adapter.msa.config import HeadReduce
    from model_adapter.msa.kernel_choice import RoutingKeyChoice, choose
    from model_adapter.msa.kernels import Kernels
    from tests.support.tiny_msa import tiny_model

    config = tiny_model().config
    by_default = choose(RoutingKeyChoice.AUTO, config, "fp32", CPU)
    assert by_default.kernels is None and "no GPU" in by_default.reason
    asked = choose(RoutingKeyChoice.TWO_STAGE, config, "fp32", CPU)
    assert asked.kernels is Kernels.TWIN and asked.storing == KeyStorage(
        KeyFormat.INT4, config.head_dim, exact=True
    )
    other = config.with_msa(head_reduce=HeadReduce.MAX)
    refused = choose(RoutingKeyChoice.INT8, other, "fp32", CPU)
    assert refused.kernels is None and "heads" in refused.reason
