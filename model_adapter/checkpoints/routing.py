"""Routing of a base that has no trained routers, by its own weights alone.

Two ways, both within the published model's rules; docs/default-model.md has the measurements.

- Attention keys: queries and pooled keys of the attention itself (`decouple_router` false).
  An untrained base finds next to nothing so: its heads look for positions and syntax.
- Value projections: router query and router key are both the layer's value projection, compared
  by cosine (`decouple_router` true, INFONCE). What a head passes on about a token says what the
  token is about, and carries no rotation. This is the default.
"""

from __future__ import annotations

from dataclasses import replace

from model_adapter.checkpoints.weights import Weights
from model_adapter.msa.config import ModelConfig, MsaConfig, QueryReduce

POOL_TOKENS = 64


def attention_routing(num_layers: int) -> MsaConfig:
    """Routing with the attention's own keys, in the last quarter of the layers."""
    return MsaConfig(
        routed_layers=tuple(range(num_layers * 3 // 4, num_layers)),
        pool_tokens=POOL_TOKENS,
        decouple_router=False,
    )


def with_value_routers(config: ModelConfig, weights: Weights) -> ModelConfig:
    """Adds routers made of value projections to `weights`; returns the config that uses them.

    The routed layers are those of `config`. router_k_proj is v_proj [K * D, M]; router_q_proj
    [H * D, M] gives every query head of a group the rows of its kv head, so that the mean over
    heads is the mean over kv heads of the cosine of a token's and a chunk's values. The mean
    over the question's tokens is taken, because a single token's value names little.
    """
    K, D = config.num_kv_heads, config.head_dim
    for index in config.msa.routed_layers:
        attention = f"model.layers.{index}.self_attn"
        value_XM = weights[f"{attention}.v_proj.weight"]
        heads_HDM = value_XM.view(K, D, -1).repeat_interleave(config.group, dim=0)
        weights[f"{attention}.router_k_proj.0.weight"] = value_XM.clone()
        weights[f"{attention}.router_q_proj.0.weight"] = heads_HDM.flatten(0, 1).contiguous()
    msa = replace(
        config.msa,
        decouple_router=True,
        aux_loss_method="INFONCE",
        query_reduce=QueryReduce.MEAN,
    )
    return replace(config, msa=msa)
