"""The decoder: Qwen3-type (q and k norms) or Llama-type, one layer at a time.

A layer is two calls, `project` and `finish`, and attention is between them: who
attends to what is the caller's business (encode.py, forward.py).

Shape suffixes, here and in the other modules of this package:
  T tokens of all rows, packed    M hidden size       V vocabulary
  H query heads   K kv heads      G = H / K           D head dim
  E = K * D       N documents     C chunks            S cached positions
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from model_adapter.msa.config import TORCH_DTYPE, LoadedModel, ModelConfig
from model_adapter.msa.kernels import Kernels
from model_adapter.msa.phases import Phase, unmeasured
from model_adapter.msa.rope import RopeTable, rotate

if TYPE_CHECKING:  # It steps a Decoder.
    from model_adapter.msa.decode_step import PooledRows

#: Called with a name ("embed", "attn0", "layer0", .. "final_norm") and a value [T, M].
Probe = Callable[[str, torch.Tensor], None]


class CheckpointError(ValueError):
    """Weights that are missing or have another shape than the config says."""


class Want(Enum):
    """Which projections a call needs, as they lie in the fused weight."""

    CONTENT = "content"
    ROUTING_QUERY = "routing query"
    ROUTING_KEY = "routing key"
    BOTH_ROUTING = "routing query and key"


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
        #: How routing goes over keys that lie on the device; None: by the formula alone.
        self.kernels: Kernels | None = None
        #: Where all rows keep their keys and values; None: every row its own.
        self.rows: PooledRows | None = None
        #: Told what a pass is at.
        self.phase: Phase = unmeasured
        self._before_attention = before_attention
        self._after_attention = after_attention

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
        asks = want in (Want.ROUTING_QUERY, Want.BOTH_ROUTING)
        keys = want in (Want.ROUTING_KEY, Want.BOTH_ROUTING)
        first = 0 if decoupled and asks else before
        stop = layer.fused.shape[0]
        if not (decoupled and keys):
            stop -= after
        bias = layer.fused_bias
        start, H, K = (before - first) // c.head_dim, c.num_heads, c.num_kv_heads
        q_THD, k_TKD, v_TKD, heads_TXD = self._before_attention(
            hidden_TM,
            layer.fused[first:stop],
            None if bias is None else bias[first:stop],
            norm_M=layer.input_norm,
            qk_norms=(layer.q_norm, layer.k_norm),
            rope=(cos_TD, sin_TD),
            heads=(start, H, K),
            eps=c.rms_norm_eps,
        )
        routing_THD = routing_TKD = None
        if asks:
            routing_THD = heads_TXD[:, :start] if decoupled else q_THD
        if keys:
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
        attended_TM, hidden_TM = self._after_attention(
            hidden_TM,
            attention_THD.flatten(1),
            out_MX=layer.out,
            out_bias_M=layer.out_bias,
            norm_M=layer.post_norm,
            gate_up=layer.gate_up,
            down=layer.down,
            eps=self.config.rms_norm_eps,
        )
        if probe is not None:
            probe(f"attn{index}", attended_TM)
            probe(f"layer{index}", hidden_TM)
        return hidden_TM

    def logits(self, hidden_TM: torch.Tensor, probe: Probe | None = None) -> torch.Tensor:
        """Vocabulary logits [T, V] in fp32."""
        normed_TM = rms_norm(hidden_TM, self.norm_M, self.config.rms_norm_eps)
        if probe is not None:
            probe("final_norm", normed_TM)
        return functional.linear(normed_TM, self.head_VM).float()

    def compile(self, backend: str = "inductor") -> None:
        """Compiles what all layers share, on both sides of attention; worth it on a GPU
        for shapes that do not change, as in training. A step of training has half a dozen
        of them (routed layers or not, with gradients or without); torch keeps eight of a
        function, and what is above that would run uncompiled."""
        self._before_attention = torch.compile(before_attention, dynamic=False, backend=backend)
        self._after_attention = torch.compile(after_attention, dynamic=False, backend=backend)

    @contextmanager
    def uncompiled(self) -> Iterator[None]:
        """Within it nothing is compiled, nor what was compiled used: for shapes that vary,
        each of which would be compiled anew."""
        compiled = self._before_attention, self._after_attention
        self._before_attention, self._after_attention = before_attention, after_attention
        try:
            yield
        finally:
            self._before_attention, self._after_attention = compiled


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm as published: fp32 inside, cast, then the weight."""
    wide = x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * scale).to(x.dtype) * weight


def before_attention(
    hidden_TM: torch.Tensor,
    rows_XM: torch.Tensor,
    bias_X: torch.Tensor | None,
    *,
    norm_M: torch.Tensor,
    qk_norms: tuple[torch.Tensor | None, torch.Tensor | None],
    rope: tuple[torch.Tensor, torch.Tensor],
    heads: tuple[int, int, int],
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k (normed, rotated), v, and all rows by head [T, X / D, D].

    heads: where the first q head lies in the rows, H, K.
    """
    cos_TD, sin_TD = rope
    start, H, K = heads
    q_norm, k_norm = qk_norms
    rows_TX = functional.linear(rms_norm(hidden_TM, norm_M, eps), rows_XM, bias_X)
    heads_TXD = rows_TX.view(rows_TX.shape[0], -1, cos_TD.shape[-1])
    q_THD = heads_TXD[:, start : start + H]
    k_TKD = heads_TXD[:, start + H : start + H + K]
    v_TKD = heads_TXD[:, start + H + K : start + H + 2 * K]
    if q_norm is not None and k_norm is not None:
        q_THD, k_TKD = rms_norm(q_THD, q_norm, eps), rms_norm(k_TKD, k_norm, eps)
    return rotate(q_THD, cos_TD, sin_TD), rotate(k_TKD, cos_TD, sin_TD), v_TKD, heads_TXD


def after_attention(
    hidden_TM: torch.Tensor,
    attention_TX: torch.Tensor,
    *,
    out_MX: torch.Tensor,
    out_bias_M: torch.Tensor | None,
    norm_M: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What attention adds, and the hidden states behind attention and MLP, both [T, M]."""
    attended_TM = functional.linear(attention_TX, out_MX, out_bias_M)
    hidden_TM = hidden_TM + attended_TM
    gate, up = functional.linear(rms_norm(hidden_TM, norm_M, eps), gate_up).chunk(2, dim=-1)
    return attended_TM, hidden_TM + functional.linear(functional.silu(gate) * up, down)


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
