"""The decoder: Qwen3-type (q and k norms) or Llama-type, one layer at a time.

A layer is two calls, `project` and `finish`, and attention is between them: who
attends to what is the caller's business (encode.py, forward.py).

Shape suffixes, here and in the other modules of this package:
  T tokens of all rows, packed    M hidden size       V vocabulary
  H query heads   K kv heads      G = H / K           D head dim
  E = K * D       N documents     C chunks            S cached positions
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import torch
from torch.nn import functional

from model_adapter.msa.config import TORCH_DTYPE, LoadedModel, ModelConfig
from model_adapter.msa.rope import RopeTable, rotate

#: Called with a name ("embed", "attn0", "layer0", .. "final_norm") and a value [T, M].
Probe = Callable[[str, torch.Tensor], None]


class CheckpointError(ValueError):
    """Weights that are missing or have another shape than the config says."""


class Want(Enum):
    """Which projections a call needs, as they lie in the fused weight."""

    CONTENT = "content"
    ROUTING_QUERY = "routing query"
    ROUTING_KEY = "routing key"


@dataclass(frozen=True)
class Projected:
    """A layer's projections. q and k are normed (qk_norm) and rotated.

    routing_THD / routing_TKD: routing query or key as asked for, else None; taken
    straight from the normed input, without norm or rotation, when the router is
    decoupled, and q or k themselves when it is not.
    """

    q_THD: torch.Tensor
    k_TKD: torch.Tensor
    v_TKD: torch.Tensor
    routing_THD: torch.Tensor | None = None
    routing_TKD: torch.Tensor | None = None


@dataclass(frozen=True)
class LayerWeights:
    """One layer. fused: rows [routing query | q | k | v | routing key], so that
    every combination that is ever needed is one contiguous slice."""

    input_norm: torch.Tensor
    post_norm: torch.Tensor
    fused: torch.Tensor
    fused_bias: torch.Tensor | None
    router_rows: tuple[int, int]
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    out: torch.Tensor
    out_bias: torch.Tensor | None
    gate_up: torch.Tensor
    down: torch.Tensor


class Decoder:
    """Weights of one model on one device, and its arithmetic."""

    def __init__(self, model: LoadedModel, device: torch.device) -> None:
        self.config: ModelConfig = model.config
        self.dtype = TORCH_DTYPE[model.compute_dtype]
        self.device = device
        reader = _Reader(model.weights, self.dtype, device)
        c = self.config
        self.embedding_VM = reader.take("model.embed_tokens.weight", c.vocab_size, c.hidden_size)
        self.norm_M = reader.take("model.norm.weight", c.hidden_size)
        self.layers = [_layer(reader, c, index) for index in range(c.num_layers)]
        self.head_VM = (
            self.embedding_VM
            if c.tie_word_embeddings
            else reader.take("lm_head.weight", c.vocab_size, c.hidden_size)
        )
        self.rope = RopeTable(c.head_dim, c.rope_theta, self.dtype, device)

    def embed(self, ids_T: torch.Tensor) -> torch.Tensor:
        """Hidden states [T, M] that enter layer 0."""
        return functional.embedding(ids_T, self.embedding_VM)

    def project(
        self,
        index: int,
        hidden_TM: torch.Tensor,
        cos_TD: torch.Tensor,
        sin_TD: torch.Tensor,
        want: Want = Want.CONTENT,
    ) -> Projected:
        """Queries, keys and values of one layer for all rows."""
        c, layer = self.config, self.layers[index]
        before, after = layer.router_rows
        decoupled = before > 0
        first = 0 if decoupled and want is Want.ROUTING_QUERY else before
        stop = layer.fused.shape[0]
        if not (decoupled and want is Want.ROUTING_KEY):
            stop -= after
        x_TM = self._norm(hidden_TM, layer.input_norm)
        bias = layer.fused_bias
        rows_TX = functional.linear(
            x_TM, layer.fused[first:stop], None if bias is None else bias[first:stop]
        )
        heads_TXD = rows_TX.view(rows_TX.shape[0], -1, c.head_dim)
        start = (before - first) // c.head_dim
        H, K = c.num_heads, c.num_kv_heads
        q_THD = heads_TXD[:, start : start + H]
        k_TKD = heads_TXD[:, start + H : start + H + K]
        v_TKD = heads_TXD[:, start + H + K : start + H + 2 * K]
        if layer.q_norm is not None and layer.k_norm is not None:
            q_THD, k_TKD = self._norm(q_THD, layer.q_norm), self._norm(k_TKD, layer.k_norm)
        q_THD, k_TKD = rotate(q_THD, cos_TD, sin_TD), rotate(k_TKD, cos_TD, sin_TD)
        routing_THD = routing_TKD = None
        if want is Want.ROUTING_QUERY:
            routing_THD = heads_TXD[:, :start] if decoupled else q_THD
        elif want is Want.ROUTING_KEY:
            routing_TKD = heads_TXD[:, start + H + 2 * K :] if decoupled else k_TKD
        return Projected(q_THD, k_TKD, v_TKD, routing_THD, routing_TKD)

    def finish(
        self,
        index: int,
        hidden_TM: torch.Tensor,
        attention_THD: torch.Tensor,
        probe: Probe | None = None,
    ) -> torch.Tensor:
        """Output projection, residuals and MLP: hidden states that leave the layer."""
        layer = self.layers[index]
        attended_TM = functional.linear(attention_THD.flatten(1), layer.out, layer.out_bias)
        if probe is not None:
            probe(f"attn{index}", attended_TM)
        hidden_TM = hidden_TM + attended_TM
        y_TM = self._norm(hidden_TM, layer.post_norm)
        gate, up = functional.linear(y_TM, layer.gate_up).chunk(2, dim=-1)
        hidden_TM = hidden_TM + functional.linear(functional.silu(gate) * up, layer.down)
        if probe is not None:
            probe(f"layer{index}", hidden_TM)
        return hidden_TM

    def logits(self, hidden_TM: torch.Tensor, probe: Probe | None = None) -> torch.Tensor:
        """Vocabulary logits [T, V] in fp32."""
        normed_TM = self._norm(hidden_TM, self.norm_M)
        if probe is not None:
            probe("final_norm", normed_TM)
        return functional.linear(normed_TM, self.head_VM).float()

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """RMSNorm as published: fp32 inside, cast, then the weight."""
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps)
        return (wide * scale).to(self.dtype) * weight


class _Reader:
    """Takes tensors out of a published name map, checking shapes."""

    def __init__(
        self, weights: dict[str, torch.Tensor], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._weights, self._dtype, self._device = weights, dtype, device

    def take(self, name: str, *shape: int) -> torch.Tensor:
        tensor = self._weights.get(name)
        if tensor is None:
            raise CheckpointError(f"{name}: missing")
        if tuple(tensor.shape) != shape or not tensor.is_floating_point():
            found = f"{tensor.dtype}{tuple(tensor.shape)}"
            raise CheckpointError(f"{name}: {found} where the config says {shape}")
        return tensor.to(device=self._device, dtype=self._dtype)

    def join(self, *parts: torch.Tensor) -> torch.Tensor:
        return torch.cat(parts).contiguous()


def _layer(reader: _Reader, c: ModelConfig, index: int) -> LayerWeights:
    base = f"model.layers.{index}."
    attention = f"{base}self_attn."
    wide, narrow = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    rows = [
        reader.take(f"{attention}q_proj.weight", wide, c.hidden_size),
        reader.take(f"{attention}k_proj.weight", narrow, c.hidden_size),
        reader.take(f"{attention}v_proj.weight", narrow, c.hidden_size),
    ]
    routed = c.msa.decouple_router and index in c.msa.routed_layers
    if routed:
        rows.insert(0, reader.take(f"{attention}router_q_proj.0.weight", wide, c.hidden_size))
        rows.append(reader.take(f"{attention}router_k_proj.0.weight", narrow, c.hidden_size))
    bias = out_bias = None
    if c.attention_bias:
        out_bias = reader.take(f"{attention}o_proj.bias", c.hidden_size)
        parts = [
            reader.take(f"{attention}{name}_proj.bias", size)
            for name, size in (("q", wide), ("k", narrow), ("v", narrow))
        ]
        if routed:  # router projections carry no bias
            parts = [parts[0].new_zeros(wide), *parts, parts[0].new_zeros(narrow)]
        bias = reader.join(*parts)
    return LayerWeights(
        input_norm=reader.take(f"{base}input_layernorm.weight", c.hidden_size),
        post_norm=reader.take(f"{base}post_attention_layernorm.weight", c.hidden_size),
        fused=reader.join(*rows),
        fused_bias=bias,
        router_rows=(wide, narrow) if routed else (0, 0),
        q_norm=reader.take(f"{attention}q_norm.weight", c.head_dim) if c.qk_norm else None,
        k_norm=reader.take(f"{attention}k_norm.weight", c.head_dim) if c.qk_norm else None,
        out=reader.take(f"{attention}o_proj.weight", c.hidden_size, wide),
        out_bias=out_bias,
        gate_up=reader.join(
            reader.take(f"{base}mlp.gate_proj.weight", c.intermediate_size, c.hidden_size),
            reader.take(f"{base}mlp.up_proj.weight", c.intermediate_size, c.hidden_size),
        ),
        down=reader.take(f"{base}mlp.down_proj.weight", c.hidden_size, c.intermediate_size),
    )
