"""The adapter that ships: what the default model is with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from model_adapter.checkpoints import SHIPPED_ADAPTER, load_engine_source, read_adapter
from model_adapter.checkpoints.default_model import FILE_SHA256
from model_adapter.msa.config import LayerChoice, LoadedModel, QueryReduce
from model_adapter.training.hygiene import SHIPPABLE
from storage.paths import DataFolder

DATA = DataFolder(Path(__file__).parents[2] / ".data")
MAX_BYTES = 24 << 20


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load_engine_source("default", DATA)


def test_what_the_default_model_is(model: LoadedModel) -> None:
    msa = model.config.msa
    assert msa.routed_layers == tuple(range(18, 30))
    assert (msa.pool_tokens, msa.top_k) == (32, 16)
    assert (msa.query_reduce, msa.layer_choice) == (QueryReduce.MAX, LayerChoice.COMBINED)
    assert model.template.lexical_weight == 0.4


def test_it_has_a_name_of_its_own(model: LoadedModel) -> None:
    """So that a memory of the base alone is moved to it, and can be kept under the base too."""
    base = load_engine_source("default", DATA, adapter="none")
    assert model.model_id == "smollm2-135m-instruct-with-memory"
    assert base.model_id == "smollm2-135m-instruct"
    assert model.identity != base.identity


def test_it_may_be_shipped() -> None:
    header = read_adapter(SHIPPED_ADAPTER).header
    assert header.base.sha256 == FILE_SHA256
    assert {source.licence for source in header.training.sources} <= SHIPPABLE
    assert all(source.attribution for source in header.training.sources)
    assert SHIPPED_ADAPTER.stat().st_size <= MAX_BYTES
