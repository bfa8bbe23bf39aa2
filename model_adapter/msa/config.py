"""What a model is: its config.json, read strictly, and a loaded model's parts.

The names are those of the published checkpoint: the Hugging Face keys of a Qwen3
or Llama decoder, and `msa_config`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Literal, TypeVar

import torch
from tokenizers import Tokenizer

from model_adapter.msa.prompt import Template
from storage.layout import KVLayout

ComputeDtype = Literal["bf16", "fp32"]

TORCH_DTYPE: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}

E = TypeVar("E", bound=StrEnum)

MAX_LAYERS = 1024
MAX_WIDTH = 1 << 20
MAX_POOL_TOKENS = 4096
MAX_TOP_K = 1024


class ConfigError(ValueError):
    """A config.json that this engine does not run; the message names the key."""


class HeadReduce(StrEnum):
    """How scores of all query heads become one."""

    MEAN = "mean"
    MAX = "max"


class QueryReduce(StrEnum):
    """How scores of the voting question tokens become one."""

    MAX = "max"
    MEAN = "mean"
    LAST = "last"


class ChunkReduce(StrEnum):
    """How scores of a document's chunks become one."""

    MAX = "max"
    MEAN = "mean"


class LayerChoice(StrEnum):
    """Whose scores select documents.

    EACH: every routed layer selects for itself, as published; a question's upper layers
    read what the lower ones selected. COMBINED: the mean of all routed layers' scores
    selects once, for all of them; no layer reads a document before that.
    """

    EACH = "each"
    COMBINED = "combined"


@dataclass(frozen=True)
class MsaConfig:
    """`msa_config` of a checkpoint, as far as inference uses it.

    routed_layers: ascending layer indices. aux_loss_method: kept as found, because
    the scoring rule follows from it. top_k: documents selected per routed layer.
    """

    routed_layers: tuple[int, ...]
    pool_tokens: int = 64
    decouple_router: bool = True
    aux_loss_method: str = "INFONCE"
    head_reduce: HeadReduce = HeadReduce.MEAN
    query_reduce: QueryReduce = QueryReduce.MAX
    chunk_reduce: ChunkReduce = ChunkReduce.MAX
    top_k: int = 16
    layer_choice: LayerChoice = LayerChoice.EACH

    def __post_init__(self) -> None:
        if not self.routed_layers or list(self.routed_layers) != sorted(set(self.routed_layers)):
            raise ConfigError(f"router_layer_idx: {self.routed_layers} is not ascending, or empty")
        _within("pooling_kernel_size", self.pool_tokens, 1, MAX_POOL_TOKENS)
        _within("top_k_docs", self.top_k, 1, MAX_TOP_K)

    @property
    def cosine(self) -> bool:
        """Routing vectors are L2-normalised per head: only for exactly "INFONCE".

        With any other value, INFONCE_DECOUPLE included, the reference scores raw dot
        products when it answers, whatever it did in training.
        """
        return self.aux_loss_method == "INFONCE"

    @property
    def query_scaled(self) -> bool:
        """Routing queries are multiplied by head_dim ** -0.5."""
        return not (self.cosine and self.decouple_router)

    @classmethod
    def parse(cls, raw: Mapping[str, Any], num_layers: int) -> MsaConfig:
        """From the `msa_config` object of a config.json. Raises ConfigError."""
        _mapping("msa_config", raw)
        top_k = raw.get("doc_top_k", raw.get("top_k_docs", 16))
        return cls(
            routed_layers=_layers(raw.get("router_layer_idx"), num_layers),
            pool_tokens=_integer(raw, "pooling_kernel_size", default=64),
            decouple_router=_boolean(raw, "decouple_router", default=True),
            aux_loss_method=_string(raw, "aux_loss_method", default="INFONCE"),
            head_reduce=_choice(HeadReduce, raw, "head_reduce_method", "mean"),
            query_reduce=_choice(QueryReduce, raw, "query_reduce_method", "max"),
            chunk_reduce=_choice(ChunkReduce, raw, "chunk_reduce_method", "max"),
            top_k=_integer({"top_k_docs": top_k}, "top_k_docs"),
        )


@dataclass(frozen=True)
class ModelConfig:
    """A Qwen3-type (qk_norm) or Llama-type decoder with routed layers."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_positions: int
    tie_word_embeddings: bool
    vocab_size: int
    attention_bias: bool
    qk_norm: bool
    msa: MsaConfig

    def __post_init__(self) -> None:
        _within("num_hidden_layers", self.num_layers, 1, MAX_LAYERS)
        for name in ("hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "vocab_size"):
            _within(name, getattr(self, name), 1, MAX_WIDTH)
        _within("head_dim", self.head_dim, 2, 1024)
        _within("max_position_embeddings", self.max_positions, 1, 1 << 27)
        if self.head_dim % 2:
            raise ConfigError(f"head_dim: {self.head_dim} is odd")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError("num_key_value_heads: does not divide num_attention_heads")
        if self.msa.routed_layers[-1] >= self.num_layers:
            raise ConfigError(f"router_layer_idx: {self.msa.routed_layers[-1]} is not a layer")
        if not (0 < self.rms_norm_eps < 1 and self.rope_theta > 0):
            raise ConfigError("rms_norm_eps or rope_theta: out of range")

    @property
    def group(self) -> int:
        """G: query heads that share one kv head."""
        return self.num_heads // self.num_kv_heads

    def layout(self, dtype: ComputeDtype) -> KVLayout:
        """Shape of the KV blocks that this model makes.

        Routing keys are stored apart from content keys whenever they differ: for
        router projections, and for normalised content keys.
        """
        return KVLayout(
            routed_layers=self.msa.routed_layers,
            kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            pool_tokens=self.msa.pool_tokens,
            dtype=dtype,
            separate_routing_keys=self.msa.decouple_router or self.msa.cosine,
        )

    def with_msa(self, **changes: Any) -> ModelConfig:
        """The same backbone with other MSA settings, under MsaConfig's field names."""
        return replace(self, msa=replace(self.msa, **changes))

    @classmethod
    def parse(cls, raw: Mapping[str, Any], msa: MsaConfig | None = None) -> ModelConfig:
        """From a config.json; `msa` stands in where the file has no `msa_config`.

        Raises ConfigError for anything that would be computed otherwise than its
        makers meant: another architecture, scaled RoPE, sliding windows, MLP biases.
        """
        _mapping("config", raw)
        model_type = _string(raw, "model_type")
        if model_type not in ("msa", "qwen3", "llama"):
            raise ConfigError(f"model_type: {model_type!r} is none of msa, qwen3, llama")
        _refuse_unsupported(raw)
        num_layers = _integer(raw, "num_hidden_layers")
        _within("num_hidden_layers", num_layers, 1, MAX_LAYERS)
        hidden_size = _integer(raw, "hidden_size")
        num_heads = _integer(raw, "num_attention_heads")
        _within("num_attention_heads", num_heads, 1, MAX_WIDTH)
        llama = model_type == "llama"
        if msa is None:
            msa = MsaConfig.parse(raw.get("msa_config", {}), num_layers)
        return cls(
            hidden_size=hidden_size,
            intermediate_size=_integer(raw, "intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=_integer(raw, "num_key_value_heads", default=num_heads),
            head_dim=_integer(
                raw, "head_dim", default=max(hidden_size // num_heads, 1) if llama else 128
            ),
            rms_norm_eps=_number(raw, "rms_norm_eps", default=1e-6),
            rope_theta=_rope_theta(raw),
            max_positions=_integer(raw, "max_position_embeddings", default=32768),
            tie_word_embeddings=_boolean(raw, "tie_word_embeddings", default=False),
            vocab_size=_integer(raw, "vocab_size"),
            attention_bias=_boolean(raw, "attention_bias", default=False),
            qk_norm=not llama,
            msa=msa,
        )


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for an engine.

    weights: the published names (`model.layers.0.self_attn.q_proj.weight`, ..),
    `lm_head.weight` absent when embeddings are tied, any float dtype; an engine
    takes them over and may drop them from the mapping to free memory. identity:
    64 hex digits over all that shapes a block. eos_ids: tokens that end an answer.
    """

    model_id: str
    display_name: str
    identity: str
    config: ModelConfig
    weights: dict[str, torch.Tensor]
    tokenizer: Tokenizer
    eos_ids: tuple[int, ...]
    template: Template
    compute_dtype: ComputeDtype


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    if raw.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"hidden_act: {raw['hidden_act']!r} is not silu")
    if raw.get("use_sliding_window"):
        raise ConfigError("use_sliding_window: windows are not supported")
    if raw.get("mlp_bias"):
        raise ConfigError("mlp_bias: not supported")
    if raw.get("rope_scaling") is not None:
        raise ConfigError("rope_scaling: only null is supported")
    if raw.get("rope_interleaved"):
        raise ConfigError("rope_interleaved: not supported")


def _rope_theta(raw: Mapping[str, Any]) -> float:
    parameters = raw.get("rope_parameters")
    if parameters is None:
        return _number(raw, "rope_theta", default=10000.0)
    _mapping("rope_parameters", parameters)
    if parameters.get("rope_type", "default") != "default":
        raise ConfigError("rope_parameters.rope_type: only default is supported")
    return _number(parameters, "rope_theta", default=10000.0)


def _layers(value: object, num_layers: int) -> tuple[int, ...]:
    if value == "all":
        return tuple(range(num_layers))
    if isinstance(value, str):
        parts: list[object] = [
            int(part) if part.strip().isascii() and part.strip().isdigit() else part
            for part in value.split(",")
        ]
    elif isinstance(value, list):
        parts = value
    else:
        raise ConfigError("router_layer_idx: neither 'all' nor comma-separated indices")
    if not all(type(part) is int and 0 <= part < num_layers for part in parts):
        raise ConfigError(f"router_layer_idx: {value!r} names a layer that is not there")
    return tuple(sorted({part for part in parts if isinstance(part, int)}))


def _mapping(key: str, value: object) -> None:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{key}: not an object")


def _within(key: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{key}: {value} is not within {low}..{high}")


def _typed(raw: Mapping[str, Any], key: str, default: object, *kinds: type) -> Any:
    value = raw.get(key, default)
    if type(value) not in kinds:
        raise ConfigError(f"{key}: {value!r} is not {' or '.join(kind.__name__ for kind in kinds)}")
    return value


def _integer(raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    return int(_typed(raw, key, default, int))


def _number(raw: Mapping[str, Any], key: str, default: float | None = None) -> float:
    return float(_typed(raw, key, default, int, float))


def _boolean(raw: Mapping[str, Any], key: str, default: bool | None = None) -> bool:
    return bool(_typed(raw, key, default, bool))


def _string(raw: Mapping[str, Any], key: str, default: str | None = None) -> str:
    return str(_typed(raw, key, default, str))


def _choice(kind: type[E], raw: Mapping[str, Any], key: str, default: str) -> E:
    value = raw.get(key, default)
    if value not in list(kind):
        raise ConfigError(f"{key}: {value!r} is none of {', '.join(kind)}")
    return kind(value)
