"""Random adapters for tiny bases."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from model_adapter.checkpoints import AdapterHeader, write_adapter
from model_adapter.checkpoints.adapter import base_hash, expected_tensors
from model_adapter.checkpoints.adapter_header import (
    AdapterLayout,
    Base,
    Training,
    TrainingSource,
)
from model_adapter.msa.config import LayerChoice, QueryReduce
from tests.support.tiny_checkpoints import HEAD_DIM, HEADS, HIDDEN, INNER, KV_HEADS, LAYERS

LAYOUT = AdapterLayout(
    num_layers=LAYERS,
    hidden_size=HIDDEN,
    heads=HEADS,
    kv_heads=KV_HEADS,
    head_dim=HEAD_DIM,
    routed_layers=(1, 2),
    pool_tokens=8,
    query_reduce=QueryReduce.MAX,
    layer_choice=LayerChoice.COMBINED,
    top_k=2,
    delta_layers=(0, 2),
    delta_parts=("qkv", "out", "gate_up", "down"),
    rank=3,
)
SOURCE = TrainingSource("train_x", "CC-BY-4.0", "A set by its makers", 12, 7)


def header(base: Path, kind: str = "llama", **layout: Any) -> AdapterHeader:
    return AdapterHeader(
        name="Tiny with memory",
        licence="Apache-2.0",
        base=Base("Tiny", base_hash(base), kind),
        layout=replace(LAYOUT, **layout),
        training=Training("a few steps", 7, 3, "0.1.0", (SOURCE,)),
    )


def random_tensors(layout: AdapterLayout, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) * 0.1
        for name, shape in expected_tensors(layout, INNER).items()
    }


def tiny_adapter(
    path: Path, base: Path, *, int8: bool = False, name: str = "", **layout: Any
) -> AdapterHeader:
    """Writes an adapter for the base at `base`."""
    made = header(base, **layout)
    made = replace(made, name=name or made.name)
    write_adapter(path, made, random_tensors(made.layout), int8=int8)
    return made
