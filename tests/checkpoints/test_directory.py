"""Directories in the published format and of plain bases."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from model_adapter.checkpoints import load_directory
from model_adapter.checkpoints.directory import model_id_of, parse_config
from model_adapter.checkpoints.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptFileError,
    InvalidConfigError,
    InvalidTokenizerError,
    InvalidWeightsError,
    UnsupportedCheckpointError,
)
from model_adapter.msa.prompt import Answering
from tests.support.tiny_checkpoints import (
    CHATML,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    LAYERS,
    PUBLISHED,
    SMOL,
    tiny_config,
    tiny_tokenizer,
    write_directory,
)


def test_loads_a_published_directory(tmp_path: Path) -> None:
    weights = write_directory(tmp_path / "My Model_4B", tiny_config())
    model = load_directory(tmp_path / "My Model_4B")
    assert model.model_id == "my-model-4b"
    assert model.display_name == "My Model_4B"
    assert model.compute_dtype == "fp32"
    assert model.weights.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(model.weights[name], tensor), name
    assert model.eos_ids == (2, 0)
    msa = model.config.msa
    assert (msa.routed_layers, msa.pool_tokens, msa.decouple_router) == ((1, 2), 16, True)
    assert not msa.cosine
    assert model.config.qk_norm
    assert model.template.answering is Answering.INTERLEAVE
    assert model.template.turn_start == (1,)
    assert model.template.reference_end == (3,)
    assert model.template.retrieval_end == "<End-of-Retrieve>"
    head = model.tokenizer.encode("<|im_start|>user\n", add_special_tokens=False).ids
    assert model.template.head == tuple(head)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_loads_a_plain_base_with_default_routing(tmp_path: Path, kind: str) -> None:
    write_directory(tmp_path, tiny_config(kind), special=SMOL)
    model = load_directory(tmp_path)
    msa = model.config.msa
    assert msa.routed_layers == (2,)
    assert msa.decouple_router
    assert msa.cosine
    value = model.weights["model.layers.2.self_attn.v_proj.weight"]
    assert torch.equal(model.weights["model.layers.2.self_attn.router_k_proj.0.weight"], value)
    queries = model.weights["model.layers.2.self_attn.router_q_proj.0.weight"]
    for head in range(HEADS):
        kv_head = head // (HEADS // KV_HEADS)
        rows = value[kv_head * HEAD_DIM : (kv_head + 1) * HEAD_DIM]
        assert torch.equal(queries[head * HEAD_DIM : (head + 1) * HEAD_DIM], rows)
    assert model.template.ask == model.template.return_documents == ""
    assert model.config.qk_norm == (kind == "qwen3")
    assert model.template.answering is Answering.ROUTED_TEXT
    assert model.template.reference_end == (3,), "<file_sep> stands for <|object_ref_end|>"
    assert model.template.retrieval_end == "<issue_closed>"


def test_a_base_without_spare_tokens_spells_the_marker(tmp_path: Path) -> None:
    write_directory(tmp_path, tiny_config("llama"), special=CHATML)
    template = load_directory(tmp_path).template
    text = tiny_tokenizer(CHATML).decode(list(template.reference_end), skip_special_tokens=False)
    assert text == "<|object_ref_end|>"
    assert template.retrieval_end == "<End-of-Retrieve>"


def test_sharded_weights_are_the_same_model(tmp_path: Path) -> None:
    write_directory(tmp_path / "one", tiny_config())
    write_directory(tmp_path / "three", tiny_config(), shards=3)
    assert load_directory(tmp_path / "one").identity == load_directory(tmp_path / "three").identity


@pytest.mark.parametrize(
    ("stored", "asked", "expected"),
    [
        (torch.float32, "auto", "fp32"),
        (torch.bfloat16, "auto", "bf16"),
        (torch.float16, "auto", "bf16"),
        (torch.bfloat16, "fp32", "fp32"),
        (torch.float32, "bf16", "bf16"),
    ],
)
def test_compute_dtype(tmp_path: Path, stored: torch.dtype, asked: str, expected: str) -> None:
    write_directory(tmp_path, tiny_config(), dtype=stored)
    model = load_directory(tmp_path, asked)
    assert model.compute_dtype == expected
    wanted = torch.float32 if expected == "fp32" else torch.bfloat16
    assert {tensor.dtype for tensor in model.weights.values()} == {wanted}


def test_unknown_dtype_is_refused(tmp_path: Path) -> None:
    write_directory(tmp_path, tiny_config())
    with pytest.raises(InvalidConfigError, match="fp8"):
        load_directory(tmp_path, "fp8")


def test_weights_are_owned_not_mapped(tmp_path: Path) -> None:
    write_directory(tmp_path, tiny_config())
    model = load_directory(tmp_path)
    before = model.weights["model.norm.weight"].clone()
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"\xff" * file.stat().st_size)
    assert torch.equal(model.weights["model.norm.weight"], before)


def test_identity_follows_content(tmp_path: Path) -> None:
    write_directory(tmp_path / "a", tiny_config())
    first = load_directory(tmp_path / "a").identity
    assert len(first) == 64
    assert load_directory(tmp_path / "a").identity == first
    shutil.copytree(tmp_path / "a", tmp_path / "renamed")
    assert load_directory(tmp_path / "renamed").identity == first
    assert load_directory(tmp_path / "a", "bf16").identity != first
    for key, value in (("rope_theta", 20000.0), ("rms_norm_eps", 1e-5)):
        config = {**tiny_config(), key: value}
        (tmp_path / "renamed" / "config.json").write_text(json.dumps(config))
        assert load_directory(tmp_path / "renamed").identity != first, key


@pytest.mark.parametrize(
    ("key", "value", "same"),
    [
        ("pooling_kernel_size", 32, False),
        ("router_layer_idx", "all", None),
        ("aux_loss_method", "INFONCE", False),
        ("aux_loss_method", "BCE", True),
        ("head_reduce_method", "max", True),
        ("query_reduce_method", "mean", True),
        ("doc_top_k", 4, True),
    ],
)
def test_identity_and_routing_settings(
    tmp_path: Path, key: str, value: object, same: bool | None
) -> None:
    """Blocks depend on how they are pooled and normalised, not on how scores are reduced."""
    write_directory(tmp_path, tiny_config())
    first = load_directory(tmp_path).identity
    config = tiny_config()
    config["msa_config"][key] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    if same is None:
        with pytest.raises(InvalidWeightsError, match=r"missing tensors.*router"):
            load_directory(tmp_path)
    else:
        assert (load_directory(tmp_path).identity == first) == same


def test_one_changed_weight_changes_the_identity(tmp_path: Path) -> None:
    weights = write_directory(tmp_path, tiny_config())
    first = load_directory(tmp_path).identity
    weights["model.layers.2.mlp.up_proj.weight"][3, 4] += 0.001
    save_file(weights, tmp_path / "model.safetensors")
    assert load_directory(tmp_path).identity != first


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"model_type": "mamba"}, UnsupportedCheckpointError, "mamba"),
        ({"architectures": ["GPT2LMHeadModel"]}, UnsupportedCheckpointError, "GPT2"),
        ({"rope_scaling": {"type": "yarn"}}, UnsupportedCheckpointError, "rope_scaling"),
        ({"partial_rotary_factor": 0.5}, UnsupportedCheckpointError, "partial_rotary"),
        ({"quantization_config": {"bits": 4}}, UnsupportedCheckpointError, "quantised"),
        ({"hidden_act": "gelu"}, InvalidConfigError, "hidden_act"),
        ({"use_sliding_window": True}, InvalidConfigError, "sliding"),
        ({"hidden_size": None}, InvalidConfigError, "hidden_size"),
        ({"hidden_size": "32"}, InvalidConfigError, "hidden_size"),
        ({"hidden_size": -1}, InvalidConfigError, "hidden_size"),
        ({"num_hidden_layers": 10**9}, InvalidConfigError, "num_hidden_layers"),
        ({"num_attention_heads": 0}, InvalidConfigError, "num_attention_heads"),
        ({"num_key_value_heads": 3}, InvalidConfigError, "num_key_value_heads"),
        ({"head_dim": 7}, InvalidConfigError, "head_dim"),
        ({"vocab_size": 10}, InvalidTokenizerError, "embeddings"),
        ({"msa_config": None}, InvalidConfigError, "msa_config"),
        ({"msa_config": {"router_layer_idx": "1,9"}}, InvalidConfigError, "router_layer_idx"),
        ({"msa_config": {"router_layer_idx": "1;2"}}, InvalidConfigError, "router_layer_idx"),
    ],
)
def test_configurations_that_are_refused(
    tmp_path: Path, changes: dict[str, Any], error: type[CheckpointError], match: str
) -> None:
    write_directory(tmp_path, tiny_config())
    (tmp_path / "config.json").write_text(json.dumps(tiny_config(**changes)))
    with pytest.raises(error, match=match):
        load_directory(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{", b"\xff\xfe", b'{"a": NaN}', b'{"a": 1, "a": 2}', b"[" * 100_000],
)
def test_json_that_is_refused(tmp_path: Path, content: bytes) -> None:
    write_directory(tmp_path, tiny_config())
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CorruptFileError, match=r"config\.json"):
        load_directory(tmp_path)


def test_oversized_json_is_refused(tmp_path: Path) -> None:
    write_directory(tmp_path, tiny_config())
    with (tmp_path / "config.json").open("ab") as file:
        file.truncate(9 << 20)
    with pytest.raises(CorruptFileError, match="larger"):
        load_directory(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_missing_files_are_named(tmp_path: Path, name: str) -> None:
    write_directory(tmp_path, tiny_config())
    (tmp_path / name).unlink()
    with pytest.raises(CheckpointNotFoundError, match=name):
        load_directory(tmp_path)


def test_pickles_are_never_a_fallback(tmp_path: Path) -> None:
    write_directory(tmp_path, tiny_config())
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointNotFoundError, match=r"model\.safetensors"):
        load_directory(tmp_path)


def test_generation_config_is_optional(tmp_path: Path) -> None:
    write_directory(tmp_path, tiny_config())
    (tmp_path / "generation_config.json").unlink()
    assert load_directory(tmp_path).eos_ids == (2,)
    config = tiny_config()
    del config["eos_token_id"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_directory(tmp_path).eos_ids == (2,), "<|im_end|>"


@pytest.mark.parametrize("value", [400, -1, "2", True, [2, 400], [0] * 65])
def test_eos_ids_are_tokens(tmp_path: Path, value: object) -> None:
    write_directory(tmp_path, tiny_config())
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(InvalidConfigError, match="eos_token_id"):
        load_directory(tmp_path)


def test_published_models_need_their_control_tokens(tmp_path: Path) -> None:
    write_directory(tmp_path, tiny_config(), special=CHATML)
    with pytest.raises(InvalidTokenizerError, match=r"object_ref_end"):
        load_directory(tmp_path)


def test_tokenizer_that_does_not_parse(tmp_path: Path) -> None:
    write_directory(tmp_path, tiny_config())
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "Telepathy"}}')
    with pytest.raises(InvalidTokenizerError, match=r"tokenizer\.json"):
        load_directory(tmp_path)


def test_tokenizer_never_truncates(tmp_path: Path) -> None:
    write_directory(tmp_path, tiny_config())
    tokenizer = tiny_tokenizer(PUBLISHED)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str())
    loaded = load_directory(tmp_path).tokenizer
    assert 4 < len(loaded.encode("weather in the north, the garden").ids) < 64


@pytest.mark.parametrize(
    ("name", "expected"),
    [("MSA-4B", "msa-4b"), ("4b", "m-4b"), ("..", "model"), ("Ünï", "n"), ("a" * 99, "a" * 63)],
)
def test_model_ids_are_resource_ids(name: str, expected: str) -> None:
    assert model_id_of(name) == expected


def test_default_routing_is_within_the_layers() -> None:
    for layers in (1, 2, 30, 36):
        config = parse_config(tiny_config("llama", num_hidden_layers=layers))
        assert config.msa.routed_layers
        assert config.msa.routed_layers[-1] < layers
    assert LAYERS > 2
