"""Weights of a decoder: which tensors a configuration asks for, and reading them from safetensors.

Names and shapes are those of the published format: a Qwen3 or Llama decoder as Hugging Face
writes it, plus router projections (paper section 3.2).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from model_adapter.checkpoints.errors import (
    CheckpointNotFoundError,
    CorruptFileError,
    InvalidWeightsError,
    UnsupportedCheckpointError,
)
from model_adapter.checkpoints.values import read_object
from model_adapter.msa.config import ModelConfig

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARDS = 1024

Weights = dict[str, torch.Tensor]

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
#: Tensors of training alone, or ones that follow from the configuration.
_IGNORED = re.compile(r"temperature|b|model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that `config` asks for, with its shape."""
    hidden, inner, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_heads * head_dim, config.num_kv_heads * head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    for index in range(config.num_layers):
        layer = f"model.layers.{index}"
        attention = f"{layer}.self_attn"
        projections = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
        for name, width in projections.items():
            shapes[f"{attention}.{name}.weight"] = (width, hidden)
        shapes[f"{attention}.o_proj.weight"] = (hidden, queries)
        if config.attention_bias:
            for name, width in {**projections, "o_proj": hidden}.items():
                shapes[f"{attention}.{name}.bias"] = (width,)
        if config.qk_norm:
            shapes[f"{attention}.q_norm.weight"] = (head_dim,)
            shapes[f"{attention}.k_norm.weight"] = (head_dim,)
        if config.msa.decouple_router and index in config.msa.routed_layers:
            shapes[f"{attention}.router_q_proj.0.weight"] = (queries, hidden)
            shapes[f"{attention}.router_k_proj.0.weight"] = (keys, hidden)
        for name, shape in {
            "gate_proj": (inner, hidden),
            "up_proj": (inner, hidden),
            "down_proj": (hidden, inner),
        }.items():
            shapes[f"{layer}.mlp.{name}.weight"] = shape
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
    return shapes


def _named(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:4])
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown


def check_names(found: set[str], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises InvalidWeightsError unless exactly the expected tensors are there.

    Training-only tensors are allowed; tied output weights are compared by the caller.
    """
    missing = expected.keys() - found
    if missing:
        raise InvalidWeightsError(f"missing tensors: {_named(missing)}")
    unexpected = {name for name in found - expected.keys() if not _IGNORED.fullmatch(name)}
    if unexpected:
        raise InvalidWeightsError(f"unexpected tensors: {_named(unexpected)}")


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Raises InvalidWeightsError for NaN or infinity."""
    # A finite tensor can have an overflowing sum, so min and max are looked at: no mask is made.
    low, high = torch.aminmax(tensor)
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise InvalidWeightsError(f"{name} holds NaN or infinity")


def _shards(folder: Path) -> list[Path]:
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    if not (folder / INDEX_FILE).is_file():
        raise CheckpointNotFoundError(
            f"no {SINGLE_FILE} or {INDEX_FILE} in {folder}; other weight formats are not read"
        )
    index = read_object(folder / INDEX_FILE).get("weight_map")
    if not isinstance(index, dict):
        raise CorruptFileError(f"{INDEX_FILE} has no object weight_map")
    names = {str(name) for name in index.values()}
    if not 1 <= len(names) <= MAX_SHARDS:
        raise CorruptFileError(f"{INDEX_FILE} names {len(names)} files")
    for name in names:
        if not _SHARD_NAME.fullmatch(name):
            raise CorruptFileError(
                f"{INDEX_FILE} names {name!r:.80}, which is not a file beside it"
            )
        if not (folder / name).is_file():
            raise CheckpointNotFoundError(f"{INDEX_FILE} names {name}, which is not there")
    return [folder / name for name in sorted(names)]


@contextmanager
def open_tensors(folder: Path) -> Iterator[dict[str, Any]]:
    """Open safetensors handles of a directory by tensor name; nothing is read yet.

    Raises CheckpointNotFoundError, CorruptFileError.
    """
    tensors: dict[str, Any] = {}
    with ExitStack() as stack:
        for path in _shards(folder):
            try:
                handle = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
                names = list(handle.keys())
            except (SafetensorError, OSError) as error:
                raise CorruptFileError(f"{path.name} is not a safetensors file: {error}") from error
            for name in names:
                if name in tensors:
                    raise CorruptFileError(f"tensor {name} stands in two files")
                tensors[name] = handle
        yield tensors


def stored_dtype(handles: Mapping[str, Any], name: str) -> torch.dtype:
    """The type a tensor is stored in. Raises InvalidWeightsError for one that is not run here."""
    dtype = str(handles[name].get_slice(name).get_dtype())
    if dtype not in _DTYPES:
        raise InvalidWeightsError(f"{name} is {dtype}, expected {', '.join(_DTYPES)}")
    return _DTYPES[dtype]


def read_weights(handles: Mapping[str, Any], config: ModelConfig, dtype: torch.dtype) -> Weights:
    """All weights of `config`, cast to `dtype`, owned in memory (not mapped).

    Shapes are compared before anything is read, so that a lying file allocates nothing.
    Raises InvalidWeightsError, UnsupportedCheckpointError.
    """
    expected = expected_shapes(config)
    tied_copy = config.tie_word_embeddings and "lm_head.weight" in handles
    check_names(set(handles) - ({"lm_head.weight"} if tied_copy else set()), expected)
    for name, shape in expected.items():
        found = tuple(handles[name].get_slice(name).get_shape())
        if found != shape:
            raise InvalidWeightsError(f"{name} is {list(found)}, expected {list(shape)}")
        stored_dtype(handles, name)
    weights: Weights = {}
    for name in expected:
        # A mapped tensor would change, or fault, when the file is replaced: hold a copy.
        tensor = handles[name].get_tensor(name).to(dtype, copy=True)
        check_finite(name, tensor)
        weights[name] = tensor
    if tied_copy:
        output = handles["lm_head.weight"].get_tensor("lm_head.weight").to(dtype)
        if not torch.equal(output, weights["model.embed_tokens.weight"]):
            raise UnsupportedCheckpointError(
                "lm_head.weight differs from the embedding although tie_word_embeddings is true"
            )
    return weights
