"""Adapter files: trained routers and low-rank deltas that turn a base into an MSA model.

One safetensors file (docs/format/adapter.md). Tensors of layer i, for the layers that the
header names:

  layers.i.router_q [H * D, M]   layers.i.router_k [K * D, M]
  layers.i.PART.a [rank, in]     layers.i.PART.b [out, rank]      delta = b @ a

PART is qkv (rows q, k, v), out, gate_up (rows gate, up) or down. A tensor is F32, BF16 or
F16, or I8 with a tensor NAME.scale F32 [rows] beside it: value = int8 * scale of its row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from model_adapter.checkpoints.adapter_header import AdapterHeader, AdapterLayout
from model_adapter.checkpoints.errors import (
    CheckpointNotFoundError,
    CorruptFileError,
    HashMismatchError,
    InvalidConfigError,
    InvalidWeightsError,
)
from model_adapter.checkpoints.identity import hash_weights
from model_adapter.checkpoints.weights import Weights, check_finite, check_names
from model_adapter.msa.config import ModelConfig

MAX_ADAPTER_BYTES = 4 << 30
#: To be raised when the same file is merged to other weights.
MERGE_VERSION = 1

_FLOATS = {"F32", "BF16", "F16"}
#: Files of a base directory that shape what it computes.
_BASE_FILES = ("config.json", "tokenizer.json", "*.safetensors")
_BLOCK = 4 << 20

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Adapter:
    """A whole adapter, checked, in memory. tensors: dequantised to fp32; digest: 64 hex
    digits over all that changes what the model computes."""

    header: AdapterHeader
    tensors: Weights
    digest: str


def base_hash(path: Path) -> str:
    """64 hex digits of a base: a file's SHA-256; of a directory, the SHA-256 of the lines
    "SHA-256, two spaces, name" of its config.json, tokenizer.json and safetensors files.

    Raises CheckpointNotFoundError, CorruptFileError.
    """
    if path.is_file():
        return _file_hash(path)
    files = sorted(found for pattern in _BASE_FILES for found in path.glob(pattern))
    if not files:
        raise CheckpointNotFoundError(f"no model in {path}")
    lines = "".join(f"{_file_hash(file)}  {file.name}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def expected_tensors(layout: AdapterLayout, intermediate_size: int) -> Shapes:
    """Every tensor that a layout asks for, with its shape; scales are not among them."""
    hidden, wide = layout.hidden_size, layout.heads * layout.head_dim
    narrow = layout.kv_heads * layout.head_dim
    sizes = {
        "qkv": (wide + 2 * narrow, hidden),
        "out": (hidden, wide),
        "gate_up": (2 * intermediate_size, hidden),
        "down": (hidden, intermediate_size),
    }
    shapes: Shapes = {}
    for index in layout.routed_layers:
        shapes[f"layers.{index}.router_q"] = (wide, hidden)
        shapes[f"layers.{index}.router_k"] = (narrow, hidden)
    for index in layout.delta_layers:
        for part in layout.delta_parts:
            rows, columns = sizes[part]
            shapes[f"layers.{index}.{part}.a"] = (layout.rank, columns)
            shapes[f"layers.{index}.{part}.b"] = (rows, layout.rank)
    return shapes


def read_adapter(path: Path) -> Adapter:
    """Reads and checks a whole file: header, names, types, finiteness; shapes as far as they
    follow from the header (`fit` compares the rest with the base).

    Raises CheckpointError.
    """
    if not path.is_file():
        raise CheckpointNotFoundError(f"no adapter file {path}")
    if path.stat().st_size > MAX_ADAPTER_BYTES:
        raise CorruptFileError(f"{path.name} is larger than {MAX_ADAPTER_BYTES} bytes")
    try:
        with safe_open(path, framework="pt", device="cpu") as handle:
            header = AdapterHeader.parse(handle.metadata(), path.name)
            _check_tensors(handle, header.layout)
            stored = {name: handle.get_tensor(name).clone() for name in list(handle.keys())}
    except (SafetensorError, OSError) as error:
        raise CorruptFileError(f"{path.name} is not a safetensors file: {error}") from error
    tensors = {name: _wide(stored, name) for name in stored if not name.endswith(".scale")}
    for name, tensor in tensors.items():
        check_finite(name, tensor)
    return Adapter(header, tensors, _digest(stored))


def write_adapter(
    path: Path, header: AdapterHeader, tensors: Mapping[str, torch.Tensor], *, int8: bool = False
) -> None:
    """Writes an adapter in one step: BF16, or I8 with one scale per row.

    Raises InvalidWeightsError for tensors that the header does not describe, or NaN.
    """
    inner = _inner_size(header.layout, {name: tuple(t.shape) for name, t in tensors.items()})
    expected = expected_tensors(header.layout, inner)
    check_names(set(tensors), expected)
    stored: Weights = {}
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != expected[name]:
            raise InvalidWeightsError(f"{name} is {list(tensor.shape)}, not {expected[name]}")
        check_finite(name, tensor)
        stored |= _narrow(name, tensor.detach().float().cpu(), int8)
    partial = path.with_name(f".{path.name}.partial")
    save_file(stored, partial, metadata=header.metadata())
    partial.replace(path)


def check_base(adapter: Adapter, path: Path) -> None:
    """Raises HashMismatchError unless the adapter was trained on the base at `path`."""
    found = base_hash(path)
    base = adapter.header.base
    if found != base.sha256:
        raise HashMismatchError(
            f"the adapter was trained on {base.name} with SHA-256 {base.sha256}, "
            f"{path.name} has {found}"
        )


def fit(adapter: Adapter, config: ModelConfig, architecture: str) -> ModelConfig:
    """The base's config with the adapter's routing. Raises InvalidConfigError,
    InvalidWeightsError when base and adapter differ in kind or shape."""
    layout = adapter.header.layout
    pairs = {
        "architecture": (adapter.header.base.architecture, architecture),
        "num_layers": (layout.num_layers, config.num_layers),
        "hidden_size": (layout.hidden_size, config.hidden_size),
        "heads": (layout.heads, config.num_heads),
        "kv_heads": (layout.kv_heads, config.num_kv_heads),
        "head_dim": (layout.head_dim, config.head_dim),
    }
    for name, (said, is_) in pairs.items():
        if said != is_:
            raise InvalidConfigError(f"the adapter's {name} is {said}, the base's is {is_}")
    for name, shape in expected_tensors(layout, config.intermediate_size).items():
        if tuple(adapter.tensors[name].shape) != shape:
            found = list(adapter.tensors[name].shape)
            raise InvalidWeightsError(f"{name} is {found}, expected {list(shape)}")
    msa = replace(
        config.msa,
        routed_layers=layout.routed_layers,
        pool_tokens=layout.pool_tokens,
        decouple_router=True,
        aux_loss_method="INFONCE",
        query_reduce=layout.query_reduce,
        layer_choice=layout.layer_choice,
        top_k=layout.top_k,
    )
    return replace(config, msa=msa)


def merge(adapter: Adapter, config: ModelConfig, weights: Weights) -> None:
    """Adds the deltas to `weights`, in fp32, and puts the routers in."""
    layout = adapter.header.layout
    wide, narrow = layout.heads * layout.head_dim, layout.kv_heads * layout.head_dim
    inner = config.intermediate_size
    rows = {
        "qkv": {"self_attn.q_proj": wide, "self_attn.k_proj": narrow, "self_attn.v_proj": narrow},
        "out": {"self_attn.o_proj": layout.hidden_size},
        "gate_up": {"mlp.gate_proj": inner, "mlp.up_proj": inner},
        "down": {"mlp.down_proj": layout.hidden_size},
    }
    dtype = weights["model.norm.weight"].dtype
    for index in layout.delta_layers:
        for part in layout.delta_parts:
            low = f"layers.{index}.{part}"
            delta = adapter.tensors[f"{low}.b"] @ adapter.tensors[f"{low}.a"]
            pieces = torch.split(delta, list(rows[part].values()))
            for name, piece in zip(rows[part], pieces, strict=True):
                full = f"model.layers.{index}.{name}.weight"
                weights[full] = (weights[full].float() + piece).to(dtype)
    for index in layout.routed_layers:
        for short in ("router_q", "router_k"):
            router = adapter.tensors[f"layers.{index}.{short}"]
            weights[f"model.layers.{index}.self_attn.{short}_proj.0.weight"] = router.to(dtype)


def _file_hash(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CorruptFileError(f"{path.name} cannot be read: {error.strerror}") from error


def _inner_size(layout: AdapterLayout, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """The base's intermediate size as a down or gate_up delta shows it; else 0."""
    for index in layout.delta_layers[:1]:
        down = shapes.get(f"layers.{index}.down.a", ())
        gate_up = shapes.get(f"layers.{index}.gate_up.b", ())
        if len(down) == 2:
            return down[1]
        if len(gate_up) == 2:
            return gate_up[0] // 2
    return 0


def _check_tensors(handle: Any, layout: AdapterLayout) -> None:
    """Names, types and shapes, before any value is read."""
    names = set(handle.keys())
    types = {name: str(handle.get_slice(name).get_dtype()) for name in names}
    shapes = {name: tuple(handle.get_slice(name).get_shape()) for name in names}
    expected = expected_tensors(layout, _inner_size(layout, shapes))
    for name, shape in dict(expected).items():
        if types.get(name) == "I8":
            expected[f"{name}.scale"] = shape[:1]
    check_names(names, expected)
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise InvalidWeightsError(f"{name} is {list(shapes[name])}, expected {list(shape)}")
        allowed = {"F32"} if name.endswith(".scale") else _FLOATS | {"I8"}
        if types[name] not in allowed:
            raise InvalidWeightsError(f"{name} is {types[name]}, not {', '.join(sorted(allowed))}")


def _wide(stored: Weights, name: str) -> torch.Tensor:
    tensor = stored[name].float()
    scale = stored.get(f"{name}.scale")
    return tensor if scale is None else tensor * scale[:, None]


def _narrow(name: str, tensor: torch.Tensor, int8: bool) -> Weights:
    if not int8:
        return {name: tensor.bfloat16()}
    scale = tensor.abs().amax(dim=1).clamp_min(1e-30) / 127
    return {name: (tensor / scale[:, None]).round().to(torch.int8), f"{name}.scale": scale}


def _digest(stored: Weights) -> str:
    return hashlib.sha256(f"{MERGE_VERSION} {hash_weights(stored)}".encode()).hexdigest()
