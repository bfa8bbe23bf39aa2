"""GGUF bases: weights, hyper-parameters and tokenizers come out as they went in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from model_adapter.checkpoints import load_engine_source, load_gguf
from model_adapter.checkpoints.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    InvalidConfigError,
    InvalidTokenizerError,
    InvalidWeightsError,
    UnsupportedCheckpointError,
)
from model_adapter.checkpoints.gguf_file import GgufFile
from model_adapter.checkpoints.gguf_model import undo_rope_order
from model_adapter.msa.prompt import Answering
from storage.paths import DataFolder
from tests.support.tiny_checkpoints import HEAD_DIM, HEADS, LAYERS, rope_order, write_gguf

QuantType = gguf.GGMLQuantizationType


def _untouched(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in weights.items() if "router" not in name}


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_weights_and_config_survive(tmp_path: Path, kind: str, tied: bool) -> None:
    weights, _ = write_gguf(tmp_path / "Tiny.gguf", kind, tied)
    model = load_gguf(tmp_path / "Tiny.gguf")
    loaded = _untouched(model.weights)
    assert loaded.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(loaded[name], tensor), name
    config = model.config
    assert (config.num_layers, config.num_heads, config.head_dim) == (LAYERS, HEADS, HEAD_DIM)
    assert (config.rms_norm_eps, config.rope_theta) == (1e-6, 10000.0)
    assert config.tie_word_embeddings == tied
    assert config.qk_norm == (kind == "qwen3")
    assert (model.model_id, model.compute_dtype, model.eos_ids) == ("tiny", "fp32", (2,))
    assert model.template.answering is Answering.ROUTED_TEXT


def test_another_pooling_size_is_another_model(tmp_path: Path) -> None:
    write_gguf(tmp_path / "Tiny.gguf", "llama", True)
    usual, other = (
        load_gguf(tmp_path / "Tiny.gguf"),
        load_gguf(tmp_path / "Tiny.gguf", pool_tokens=8),
    )
    assert (usual.model_id, other.model_id) == ("tiny", "tiny-pool-8")
    assert usual.identity != other.identity
    assert (usual.config.msa.pool_tokens, other.config.msa.pool_tokens) == (64, 8)


@pytest.mark.parametrize(
    "spec", ["default:", "default:pool=8", "default:pool_tokens=0", "default:x"]
)
def test_what_the_default_model_does_not_take(tmp_path: Path, spec: str) -> None:
    with pytest.raises(CheckpointError):
        load_engine_source(spec, DataFolder(tmp_path))


def test_rope_order_is_undone() -> None:
    rows = np.arange(HEADS * HEAD_DIM * 3, dtype=np.float32).reshape(HEADS * HEAD_DIM, 3)
    ordered = rope_order(rows, HEADS)
    assert not np.array_equal(ordered, rows)
    assert np.array_equal(undo_rope_order(ordered, HEADS), rows)
    assert np.array_equal(undo_rope_order(ordered[:, 0], HEADS), rows[:, 0])


def test_interleaved_rotation_of_the_file_is_half_split_rotation_of_the_model() -> None:
    """The reason for the reordering: both give the same scores at every distance."""
    generator = np.random.default_rng(3)
    q, k = generator.normal(size=(2, HEAD_DIM)).astype(np.float32)
    angles = 1 / 10000 ** (np.arange(0, HEAD_DIM, 2) / HEAD_DIM)

    def half_split(x: Any, position: int) -> Any:
        cos, sin = np.cos(position * angles), np.sin(position * angles)
        first, second = x[: HEAD_DIM // 2], x[HEAD_DIM // 2 :]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin])

    def interleaved(x: Any, position: int) -> Any:
        cos, sin = np.cos(position * angles), np.sin(position * angles)
        turned = np.empty_like(x)
        turned[0::2] = x[0::2] * cos - x[1::2] * sin
        turned[1::2] = x[1::2] * cos + x[0::2] * sin
        return turned

    for position in (1, 5, 200):
        file_score = interleaved(q, position) @ interleaved(k, 2)
        ours = half_split(undo_rope_order(q, 1), position) @ half_split(undo_rope_order(k, 1), 2)
        assert file_score == pytest.approx(ours, abs=1e-5)


@pytest.mark.parametrize(
    ("quant", "error"),
    [(QuantType.Q8_0, 0.01), (QuantType.Q4_1, 0.12), (QuantType.F16, 1e-3), (QuantType.BF16, 0.01)],
)
def test_quantised_weights(tmp_path: Path, quant: QuantType, error: float) -> None:
    weights, _ = write_gguf(tmp_path / "q.gguf", quant=quant)
    model = load_gguf(tmp_path / "q.gguf", "fp32")
    for name, tensor in weights.items():
        spread = float((model.weights[name] - tensor).norm() / tensor.norm())
        assert spread < error, name
    assert load_gguf(tmp_path / "q.gguf").compute_dtype == "bf16"


def test_reader_agrees_with_the_package(tmp_path: Path) -> None:
    write_gguf(tmp_path / "q.gguf", quant=QuantType.Q8_0, metadata={"llama.vocab_size": 400})
    reader = gguf.GGUFReader(tmp_path / "q.gguf")
    with GgufFile(tmp_path / "q.gguf") as file:
        fields = {key: field for key, field in reader.fields.items() if "GGUF." not in key}
        assert file.metadata.keys() == fields.keys()
        for key, field in fields.items():
            assert file.metadata[key] == field.contents(), key
        assert file.tensors.keys() == {tensor.name for tensor in reader.tensors}
        for tensor in reader.tensors:
            expected = gguf.dequantize(tensor.data, tensor.tensor_type)
            assert np.array_equal(file.values(tensor.name), expected), tensor.name


def test_same_model_as_directory_and_as_gguf_encodes_alike(tmp_path: Path) -> None:
    weights, tokenizer = write_gguf(tmp_path / "a.gguf")
    model = load_gguf(tmp_path / "a.gguf")
    assert torch.equal(
        model.weights["model.layers.0.self_attn.q_proj.weight"],
        weights["model.layers.0.self_attn.q_proj.weight"],
    )
    # The digits of smollm are apart, which the plain tokenizer of the test does not do.
    text = "it's what they'd said about the garden"
    assert model.tokenizer.encode(text).ids == tokenizer.encode(text).ids


TEXTS = [
    "The weather in 2024: 12 degrees, they'd said.",
    "  two  spaces\n\n\nand\ttabs ",
    "Grüße, 東京 and 🙂 emoji",
    "",
    "<|im_start|> is text here? no: 1234567890",
]


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "qwen2", "llama-bpe"])
def test_tokenizer_round_trip(tmp_path: Path, pre: str) -> None:
    write_gguf(tmp_path / "a.gguf", pre=pre)
    tokenizer = load_gguf(tmp_path / "a.gguf").tokenizer
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("smollm", ["in", "Ġ", "1", "9", "9", "9", "Ċ", "Ċ", "it", "'s"]),
        ("gpt-2", ["in", "Ġ1999", "Ċ", "Ċ", "it", "'s"]),
        ("qwen2", ["in", "Ġ", "1", "9", "9", "9", "ĊĊ", "it", "'s"]),
        ("llama-bpe", ["in", "Ġ", "199", "9", "ĊĊ", "it", "'s"]),
    ],
)
def test_text_is_split_as_its_maker_did(tmp_path: Path, pre: str, pieces: list[str]) -> None:
    write_gguf(tmp_path / "a.gguf", pre=pre)
    tokenizer = load_gguf(tmp_path / "a.gguf").tokenizer
    split = tokenizer.pre_tokenizer.pre_tokenize_str("in 1999\n\nit's")
    assert [piece for piece, _ in split] == pieces


def test_special_tokens_parse_and_can_be_switched_off(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf")
    tokenizer: Tokenizer = load_gguf(tmp_path / "a.gguf").tokenizer
    assert tokenizer.encode("<|im_start|>user<|im_end|>").ids[0] == 1
    tokenizer.encode_special_tokens = True
    ids = tokenizer.encode("<|im_start|>user").ids
    assert 1 not in ids
    assert tokenizer.decode(ids) == "<|im_start|>user"


def test_identity_is_stable_and_follows_the_file(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf")
    write_gguf(tmp_path / "b.gguf")
    write_gguf(tmp_path / "c.gguf", pre="gpt-2")
    first = load_gguf(tmp_path / "a.gguf").identity
    assert load_gguf(tmp_path / "b.gguf", display_name="other").identity == first
    assert load_gguf(tmp_path / "c.gguf").identity != first, "another tokenizer"


@pytest.mark.parametrize(
    ("metadata", "error", "match"),
    [
        ({"general.architecture": "gemma"}, UnsupportedCheckpointError, "gemma"),
        ({"llama.rope.scaling.type": "yarn"}, UnsupportedCheckpointError, "RoPE"),
        ({"llama.expert_count": 8}, UnsupportedCheckpointError, "experts"),
        ({"llama.rope.dimension_count": 4}, UnsupportedCheckpointError, "rope.dimension_count"),
        ({"split.count": 3}, UnsupportedCheckpointError, "split"),
        ({"llama.block_count": 2}, InvalidWeightsError, "unexpected"),
        ({"llama.block_count": 4}, InvalidWeightsError, "missing"),
        ({"llama.block_count": 2**31}, InvalidConfigError, "layers"),
        ({"llama.attention.head_count": 0}, CheckpointError, "0 heads|division"),
        ({"llama.attention.head_count_kv": 0}, CheckpointError, "head"),
        ({"llama.embedding_length": 64}, InvalidWeightsError, "expected"),
        ({"llama.context_length": "long"}, InvalidConfigError, "context_length"),
        ({"general.alignment": 48}, CheckpointError, "alignment"),
        ({"tokenizer.ggml.eos_token_id": 4000}, InvalidConfigError, "eos"),
    ],
)
def test_files_that_are_refused(
    tmp_path: Path, metadata: dict[str, Any], error: type[CheckpointError], match: str
) -> None:
    path = tmp_path / "a.gguf"
    write_gguf(path)
    with path.open("rb") as file:
        content = file.read()
    path.write_bytes(_with_metadata(content, metadata))
    with pytest.raises(error, match=match):
        load_gguf(path)


def _with_metadata(content: bytes, metadata: dict[str, Any]) -> bytes:
    """Replaces or adds entries by rewriting the header; tensors are moved as they are."""
    import struct

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    def entry(key: str, value: Any) -> bytes:
        kind, raw = (8, text(value)) if isinstance(value, str) else (4, struct.pack("<I", value))
        return text(key) + struct.pack("<I", kind) + raw

    tensors, entries = struct.unpack_from("<QQ", content, 8)
    added = b""
    for key, value in metadata.items():
        position = content.find(text(key))
        if position < 0:
            entries += 1
            added += entry(key, value)
            continue
        after = position + len(text(key))
        kind = struct.unpack_from("<I", content, after)[0]
        size = 4 if kind == 4 else 8 + struct.unpack_from("<Q", content, after + 4)[0]
        content = content[:position] + entry(key, value) + content[after + 4 + size :]
    header = struct.pack("<QQ", tensors, entries)
    return content[:8] + header + added + content[24:]


def test_missing_tensor_and_missing_file(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", drop="model.layers.1.mlp.up_proj.weight")
    with pytest.raises(InvalidWeightsError, match=r"layers\.1\.mlp\.up_proj"):
        load_gguf(tmp_path / "a.gguf")
    with pytest.raises(CheckpointNotFoundError):
        load_gguf(tmp_path / "b.gguf")


def test_unknown_text_splitting_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", pre="mystery")
    with pytest.raises(UnsupportedCheckpointError, match="mystery"):
        load_gguf(tmp_path / "a.gguf")


def test_merges_of_unknown_tokens_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    _, tokenizer = write_gguf(path)
    merge = " ".join(json.loads(tokenizer.to_str())["model"]["merges"][0])
    damaged = path.read_bytes().replace(merge.encode(), b"\x01" * len(merge.encode()), 1)
    path.write_bytes(damaged)
    with pytest.raises(InvalidTokenizerError):
        load_gguf(path)
