"""Routing settings for a base that has no trained routers (docs/default-model.md)."""

from __future__ import annotations

from model_adapter.msa.config import MsaConfig


def default_msa(num_layers: int) -> MsaConfig:
    """Routing with the attention's own keys in the later half of the layers."""
    return MsaConfig(
        routed_layers=tuple(range(num_layers // 2, num_layers)),
        pool_tokens=64,
        decouple_router=False,
    )
