"""Configuration, template, detokenising, sampling, KV cache, positions, weights."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model_adapter.engine import EngineError, ModelMismatchError
from model_adapter.msa.config import ConfigError, ModelConfig, MsaConfig
from model_adapter.msa.encode import from_bits, to_bits
from model_adapter.msa.forward import Attend, Segment, new_row, run
from model_adapter.msa.generate import AnswerText
from model_adapter.msa.kvcache import KVCache
from model_adapter.msa.memory import InMemoryView
from model_adapter.msa.model import CheckpointError, Decoder
from model_adapter.msa.rope import RopeTable, rotate
from model_adapter.msa.sampling import Detokeniser, Sampler
from tests.support.golden_checkpoint import GOLDEN
from tests.support.tiny_msa import TEXTS, remember, tiny_engine, tiny_model, tokenizer

CPU = torch.device("cpu")
RAW: dict[str, Any] = json.loads((GOLDEN / "checkpoint" / "config.json").read_text())


def test_the_published_config() -> None:
    config = ModelConfig.parse(RAW)
    assert config.msa.routed_layers == (2, 3) and config.qk_norm and config.group == 2
    assert not config.msa.cosine and config.msa.query_scaled
    layout = config.layout("bf16")
    assert layout.separate_routing_keys and layout.width == 64


@pytest.mark.parametrize(
    ("aux", "decoupled", "cosine", "scaled", "separate"),
    [
        ("INFONCE", True, True, False, True),
        ("INFONCE", False, True, True, True),
        ("INFONCE_DECOUPLE", True, False, True, True),
        ("INFONCE_DECOUPLE", False, False, True, False),
        ("BCE", True, False, True, True),
    ],
)
def test_scoring_rules(
    aux: str, decoupled: bool, cosine: bool, scaled: bool, separate: bool
) -> None:
    config = ModelConfig.parse(RAW).with_msa(aux_loss_method=aux, decouple_router=decoupled)
    assert config.msa.cosine is cosine and config.msa.query_scaled is scaled
    assert config.layout("fp32").separate_routing_keys is separate


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "mamba"), ("hidden_act", "gelu"), ("rope_scaling", {"type": "yarn"}),
        ("use_sliding_window", True), ("num_hidden_layers", 0), ("num_hidden_layers", "4"),
        ("num_hidden_layers", True), ("head_dim", 31), ("num_key_value_heads", 3),
        ("num_attention_heads", 0), ("rms_norm_eps", 0), ("vocab_size", None), ("mlp_bias", True),
        ("rope_parameters", {"rope_type": "llama3"}), ("msa_config", []), ("hidden_size", 1 << 40),
    ],
)  # fmt: skip
def test_a_config_that_is_not_run_is_refused(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=r"\w+: "):
        ModelConfig.parse({**RAW, key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("router_layer_idx", "2,4"), ("router_layer_idx", ""), ("router_layer_idx", "-1"),
        ("router_layer_idx", None), ("router_layer_idx", "1,x"), ("pooling_kernel_size", 0),
        ("pooling_kernel_size", 1.5), ("head_reduce_method", "sum"), ("decouple_router", "yes"),
        ("query_reduce_method", []), ("chunk_reduce_method", 1), ("top_k_docs", 0),
        ("aux_loss_method", 3),
    ],
)  # fmt: skip
def test_a_bad_msa_config_names_its_key(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=key):
        MsaConfig.parse({**RAW["msa_config"], key: value}, num_layers=4)


def test_all_layers_may_route() -> None:
    msa = MsaConfig.parse({**RAW["msa_config"], "router_layer_idx": "all"}, num_layers=4)
    assert msa.routed_layers == (0, 1, 2, 3)
    engine = tiny_engine(routed_layers=(0, 1, 2, 3), decouple_router=False)
    ranked = engine.route("who?", remember(engine), 2)
    assert {layer.layer for document in ranked for layer in document.layers} <= {0, 1, 2, 3}


def test_missing_or_misshapen_weights_are_named() -> None:
    model = tiny_model()
    name = "model.layers.1.mlp.down_proj.weight"
    for weights in (
        {key: value for key, value in model.weights.items() if key != name},
        {**model.weights, name: torch.zeros(3, 3)},
        {**model.weights, name: torch.zeros(128, 256, dtype=torch.int32)},
    ):
        with pytest.raises(CheckpointError, match=name):
            Decoder(replace(model, weights=weights), CPU)


def test_a_llama_type_model_with_biases_and_tied_embeddings_runs() -> None:
    model = tiny_model(decouple_router=False)
    config = replace(model.config, qk_norm=False, attention_bias=True, tie_word_embeddings=True)
    weights = {k: v for k, v in model.weights.items() if "_norm" not in k and "lm_head" not in k}
    for layer in range(4):
        for name, size in (("q", 128), ("k", 64), ("v", 64), ("o", 128)):
            weights[f"model.layers.{layer}.self_attn.{name}_proj.bias"] = torch.ones(size)
    with torch.inference_mode():
        decoder = Decoder(replace(model, config=config, weights=weights), CPU)
        logits = run(decoder, [Segment(new_row(decoder), [5, 6, 7])]).logits
    assert logits is not None and logits.shape == (1, 791) and bool(logits.isfinite().all())


@given(st.text(max_size=60))
def test_streamed_text_is_the_whole_text(text: str) -> None:
    ids = tokenizer().encode(text, add_special_tokens=False).ids
    stream = Detokeniser(tokenizer(), specials=True)
    parts = [stream.push(token) for token in ids]
    assert "".join(parts) + stream.flush() == tokenizer().decode(ids, skip_special_tokens=False)
    if "\ufffd" not in text:
        assert not any("\ufffd" in part for part in parts)


def test_answer_text_begins_behind_its_mark() -> None:
    ids = tokenizer().encode("[3] hm. The answer to the question is: the é river").ids
    answer = AnswerText(tokenizer(), "The answer to the question is:")
    parts = [answer.push(token) for token in ids]
    assert "".join(parts) + answer.flush() == "the é river"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers_end_their_own_row(bad: float) -> None:
    logits_V = torch.tensor([0.5, bad, 0.15])
    with pytest.raises(EngineError):
        Sampler(1.0, 1.0, seed=1).pick(logits_V)


def test_top_p_keeps_the_likeliest() -> None:
    logits_V = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    sampler = Sampler(1.0, 0.7, seed=1)
    assert {sampler.pick(logits_V) for _ in range(200)} == {0, 1}
    assert {Sampler(1.0, 1.0, seed=s).pick(logits_V) for s in range(1, 200)} == {0, 1, 2, 3}
    assert Sampler(0.0, 0.1, seed=0).pick(logits_V) == 0


@given(st.lists(st.integers(1, 150), min_size=1, max_size=6))
def test_the_cache_holds_what_was_appended(sizes: list[int]) -> None:
    config = tiny_model().config
    cache = KVCache(config, torch.float32, CPU)
    every = torch.randn(sum(sizes), config.num_kv_heads, config.head_dim)
    for part in torch.split(every, sizes):
        cache.append(2, part, -part)
    keys, values = cache.read(2)
    assert torch.equal(keys, every.transpose(0, 1)) and torch.equal(values, -keys)
    assert cache.length(2) == sum(sizes) and cache.length(0) == 0


def test_rotation_by_position_keeps_products_relative() -> None:
    table = RopeTable(32, 5e6, torch.float32, CPU)
    q, k = torch.randn(1, 1, 32), torch.randn(1, 1, 32)

    def product(a: int, b: int) -> float:
        turned_q = rotate(q, *table.span(a, 1))
        return float((turned_q * rotate(k, *table.span(b, 1))).sum())

    assert product(9, 4) == pytest.approx(product(3005, 3000), abs=1e-3)
    assert torch.equal(table.at(torch.tensor([7]), 8)[0], table.span(7, 1)[0])


def test_a_ghost_leaves_no_trace() -> None:
    decoder = tiny_engine()._model.decoder
    with torch.inference_mode():
        plain, haunted = new_row(decoder), new_row(decoder)
        for row in (plain, haunted):
            run(decoder, [Segment(row, [5, 6, 7])])
        run(decoder, [Segment(haunted, [9], attend=Attend.GHOST)])
        assert haunted.position == 3 and haunted.cache.length(0) == 3
        ours = run(decoder, [Segment(plain, [8])]).logits
        theirs = run(decoder, [Segment(haunted, [8])]).logits
    assert ours is not None and theirs is not None and torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_are_exact(dtype: torch.dtype) -> None:
    tensor = torch.randn(3, 5).to(dtype)
    assert torch.equal(from_bits(to_bits(tensor)), tensor)


def test_blocks_of_another_layout_are_refused() -> None:
    engine = tiny_engine()
    blocks = tiny_engine(pool_tokens=16).encode([]).blocks
    memory = remember(tiny_engine(pool_tokens=16))
    assert not blocks and len(memory.numbers_N) == len(TEXTS)
    other = tiny_engine(decouple_router=False)
    from model_adapter.engine import DocumentText

    foreign = other.encode([DocumentText(1, "boat")]).blocks
    with pytest.raises(ModelMismatchError):
        InMemoryView(engine.description.layout, foreign, {1: "boat"})
