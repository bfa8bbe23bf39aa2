"""Weights in safetensors: names, shapes, types and values are all compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from model_adapter.checkpoints import load_directory
from model_adapter.checkpoints.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptFileError,
    InvalidWeightsError,
    UnsupportedCheckpointError,
)
from tests.support.tiny_checkpoints import tiny_config, write_directory

Weights = dict[str, torch.Tensor]
Q = "model.layers.1.self_attn.q_proj.weight"


def _drop(weights: Weights) -> None:
    del weights[Q]


def _extra(weights: Weights) -> None:
    weights["model.layers.1.self_attn.lora_A"] = torch.zeros(2)


def _bias(weights: Weights) -> None:
    weights[Q.replace("weight", "bias")] = torch.zeros(32)


def _shape(weights: Weights) -> None:
    weights[Q] = weights[Q][:-1].clone()


def _transposed(weights: Weights) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = weights[name].T.contiguous()


def _int8(weights: Weights) -> None:
    weights[Q] = weights[Q].to(torch.int8)


def _nan(weights: Weights) -> None:
    weights[Q][3, 3] = float("nan")


def _infinite(weights: Weights) -> None:
    weights["model.norm.weight"][0] = float("-inf")


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (_drop, r"missing tensors: .*q_proj"),
        (_extra, r"unexpected tensors: .*lora_A"),
        (_bias, r"unexpected tensors: .*q_proj\.bias"),
        (_shape, r"\[31, 32\], expected \[32, 32\]"),
        (_transposed, r"\[32, 64\], expected \[64, 32\]"),
        (_int8, r"is I8"),
        (_nan, r"q_proj.weight holds NaN"),
        (_infinite, r"norm.weight holds NaN or infinity"),
    ],
)
def test_weights_that_are_refused(
    tmp_path: Path, damage: Callable[[Weights], None], match: str
) -> None:
    weights = write_directory(tmp_path, tiny_config())
    damage(weights)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(InvalidWeightsError, match=match):
        load_directory(tmp_path)


def test_training_only_tensors_are_ignored(tmp_path: Path) -> None:
    weights = write_directory(tmp_path, tiny_config())
    first = load_directory(tmp_path).identity
    save_file({**weights, "temperature": torch.tensor(0.1)}, tmp_path / "model.safetensors")
    model = load_directory(tmp_path)
    assert "temperature" not in model.weights
    assert model.identity == first


def test_tied_embeddings(tmp_path: Path) -> None:
    weights = write_directory(tmp_path, tiny_config("llama", tie_word_embeddings=True))
    assert "lm_head.weight" not in weights
    first = load_directory(tmp_path).identity
    embedding = weights["model.embed_tokens.weight"]
    save_file({**weights, "lm_head.weight": embedding.clone()}, tmp_path / "model.safetensors")
    assert load_directory(tmp_path).identity == first, "a copy says nothing new"
    save_file({**weights, "lm_head.weight": embedding + 1}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedCheckpointError, match="lm_head"):
        load_directory(tmp_path)


def test_attention_biases(tmp_path: Path) -> None:
    weights = write_directory(tmp_path, tiny_config("qwen3", attention_bias=True))
    model = load_directory(tmp_path)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        bias = f"model.layers.0.self_attn.{name}.bias"
        assert torch.equal(model.weights[bias], weights[bias])


def _edit_index(folder: Path, change: Callable[[dict[str, str]], None]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_directory(tmp_path, tiny_config(), shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointNotFoundError, match="00002-of-00003"):
        load_directory(tmp_path)


def test_a_shard_left_out_of_the_index(tmp_path: Path) -> None:
    write_directory(tmp_path, tiny_config(), shards=2)

    def change(index: dict[str, str]) -> None:
        for name in list(index):
            index[name] = "model-00001-of-00002.safetensors"

    _edit_index(tmp_path, change)
    with pytest.raises(InvalidWeightsError, match="missing tensors"):
        load_directory(tmp_path)


def test_one_tensor_in_two_shards(tmp_path: Path) -> None:
    weights = write_directory(tmp_path, tiny_config(), shards=2)
    save_file(weights, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(CorruptFileError, match="two files"):
        load_directory(tmp_path)


def test_an_index_without_a_map(tmp_path: Path) -> None:
    write_directory(tmp_path, tiny_config(), shards=2)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": []}')
    with pytest.raises(CheckpointError, match="weight_map"):
        load_directory(tmp_path)
