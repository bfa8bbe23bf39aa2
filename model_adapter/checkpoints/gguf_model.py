"""A Llama-type or Qwen3-type base in one GGUF file, dequantised."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from gguf.constants import GGMLQuantizationType

from model_adapter.checkpoints.adapter import Adapter, check_base, fit, merge
from model_adapter.checkpoints.directory import model_id_of, resolve_dtype
from model_adapter.checkpoints.errors import (
    InvalidConfigError,
    InvalidWeightsError,
    UnsupportedCheckpointError,
)
from model_adapter.checkpoints.gguf_file import GgufFile
from model_adapter.checkpoints.gguf_tokenizer import tokenizer_json
from model_adapter.checkpoints.identity import model_identity
from model_adapter.checkpoints.routing import attention_routing, with_value_routers
from model_adapter.checkpoints.values import token_ids
from model_adapter.checkpoints.vocabulary import base_template, check_vocabulary, parse_tokenizer
from model_adapter.checkpoints.weights import Weights, check_finite, check_names, expected_shapes
from model_adapter.msa.config import (
    MAX_LAYERS,
    TORCH_DTYPE,
    ConfigError,
    LoadedModel,
    ModelConfig,
)

_ARCHITECTURES = ("llama", "qwen3")

#: GGUF name -> published name, outside and inside a layer.
_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER = re.compile(r"blk\.(\d{1,4})\.([a-z_]+)\.(weight|bias)")


def published_name(name: str) -> str:
    """The published name of a GGUF tensor. Raises UnsupportedCheckpointError for an unknown one."""
    if name in _TOP:
        return _TOP[name]
    match = _LAYER.fullmatch(name)
    if match is None or match[2] not in _IN_LAYER:
        raise UnsupportedCheckpointError(
            f"tensor {name!r:.80} belongs to a model that is not run here"
        )
    return f"model.layers.{int(match[1])}.{_IN_LAYER[match[2]]}.{match[3]}"


def undo_rope_order(values: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Rows of a q or k projection as Hugging Face orders them.

    GGUF's llama architecture rotates neighbouring pairs (2j, 2j + 1), so its conversion
    interleaves the two halves of every head; here RoPE rotates (j, j + D/2).
    `values` is [heads * D, ...].
    """
    paired = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
    return paired.swapaxes(1, 2).reshape(values.shape)


def read_config(file: GgufFile) -> ModelConfig:
    """The decoder that the metadata describes, routing by attention keys.

    Raises InvalidConfigError, UnsupportedCheckpointError.
    """
    architecture = file.get("general.architecture", str)
    if architecture not in _ARCHITECTURES:
        raise UnsupportedCheckpointError(
            f"{file.name}: architecture {architecture!r:.40} is none of {', '.join(_ARCHITECTURES)}"
        )
    _refuse_unsupported(file, architecture)

    def whole(key: str, default: int | None = None) -> int:
        return int(file.get(f"{architecture}.{key}", int, default=default))

    hidden, heads, layers = (
        whole("embedding_length"),
        whole("attention.head_count"),
        whole("block_count"),
    )
    if not (1 <= layers <= MAX_LAYERS and heads >= 1):
        raise InvalidConfigError(f"{file.name}: {layers} layers of {heads} heads")
    head_dim = whole("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if whole(key, head_dim) != head_dim:
            raise UnsupportedCheckpointError(f"{file.name}: {key} is not the head's {head_dim}")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise InvalidWeightsError(f"{file.name}: no token_embd.weight")
    try:
        return ModelConfig(
            hidden_size=hidden,
            intermediate_size=whole("feed_forward_length"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=whole("attention.head_count_kv", heads),
            head_dim=head_dim,
            rms_norm_eps=_decimal(
                file.get(f"{architecture}.attention.layer_norm_rms_epsilon", float)
            ),
            rope_theta=_decimal(file.get(f"{architecture}.rope.freq_base", float, default=1e4)),
            max_positions=whole("context_length"),
            tie_word_embeddings="output.weight" not in file.tensors,
            vocab_size=embedding.shape[0],
            attention_bias="blk.0.attn_q.bias" in file.tensors,
            qk_norm=architecture == "qwen3",
            msa=attention_routing(layers),
        )
    except (ConfigError, ZeroDivisionError) as error:
        raise InvalidConfigError(f"{file.name}: {error}") from error


def _decimal(value: float) -> float:
    """The decimal that was stored as fp32: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _refuse_unsupported(file: GgufFile, architecture: str) -> None:
    scaling = file.metadata.get(f"{architecture}.rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in file.tensors:
        raise UnsupportedCheckpointError(f"{file.name}: scaled RoPE is not supported")
    if file.metadata.get(f"{architecture}.expert_count", 0) != 0:
        raise UnsupportedCheckpointError(f"{file.name}: mixtures of experts are not supported")
    if file.metadata.get("split.count", 1) != 1:
        raise UnsupportedCheckpointError(f"{file.name}: one part of a split file; merge it first")


def read_weights(file: GgufFile, config: ModelConfig, dtype: torch.dtype) -> Weights:
    """All weights under their published names, cast to `dtype`.

    Names and shapes are compared before anything is read. Raises CheckpointError.
    """
    expected = expected_shapes(config)
    sources: dict[str, str] = {}
    for source in file.tensors:
        if sources.setdefault(published_name(source), source) != source:
            raise InvalidWeightsError(f"{file.name}: two tensors are {published_name(source)}")
    check_names(set(sources), expected)
    for name, shape in expected.items():
        found = file.tensors[sources[name]].shape
        if found != shape:
            raise InvalidWeightsError(f"{sources[name]} is {list(found)}, expected {list(shape)}")
    return dict(_converted(file, config, dtype, sources))


def _converted(
    file: GgufFile, config: ModelConfig, dtype: torch.dtype, sources: dict[str, str]
) -> Iterator[tuple[str, torch.Tensor]]:
    interleaved = file.metadata["general.architecture"] == "llama"
    for name, source in sources.items():
        values = file.values(source)
        if interleaved and ".q_proj." in name:
            values = undo_rope_order(values, config.num_heads)
        elif interleaved and ".k_proj." in name:
            values = undo_rope_order(values, config.num_kv_heads)
        tensor = torch.from_numpy(np.ascontiguousarray(values)).to(dtype, copy=True)
        check_finite(source, tensor)
        yield name, tensor


def load_gguf(
    path: Path,
    dtype: str = "auto",
    display_name: str = "",
    adapter: Adapter | None = None,
    pool_tokens: int = 0,
) -> LoadedModel:
    """Loads one GGUF file with its tokenizer. "auto" computes fp32 only for F32 weights.

    adapter: merged in, in place of value routers; it must have been trained on this file.
    pool_tokens: tokens per chunk, part of the name; 0 for the usual; not with an adapter,
    which was trained for its own. Raises CheckpointError.
    """
    if adapter is not None:
        if pool_tokens:
            raise InvalidConfigError("an adapter has its own pool_tokens")
        check_base(adapter, path)
    with GgufFile(path) as file:
        config = read_config(file)
        if pool_tokens:
            config = replace(config, msa=replace(config.msa, pool_tokens=pool_tokens))
            display_name = f"{display_name or path.stem}, pool {pool_tokens}"
        content = tokenizer_json(file)
        tokenizer = parse_tokenizer(content, file.name)
        check_vocabulary(tokenizer, config.vocab_size)
        end = file.get("tokenizer.ggml.eos_token_id", int)
        full = file.tensors["token_embd.weight"].kind == GGMLQuantizationType.F32
        compute = resolve_dtype(dtype, torch.float32 if full else torch.bfloat16)
        routed = config
        if adapter is not None:
            routed = fit(adapter, config, file.get("general.architecture", str))
        weights = read_weights(file, config, TORCH_DTYPE[compute])
        name = display_name or str(file.metadata.get("general.name", path.stem))[:128]
    template = base_template(tokenizer, trained=adapter is not None)
    digest = ""
    if adapter is None:
        routed = with_value_routers(config, weights)
    else:
        display_name = name = adapter.header.model_name
        digest = adapter.digest
    identity = model_identity(routed, weights, content, template, compute, adapter_digest=digest)
    if adapter is not None:
        merge(adapter, routed, weights)
    return LoadedModel(
        model_id=model_id_of(display_name or path.stem),
        display_name=name,
        identity=identity,
        config=routed,
        weights=weights,
        tokenizer=tokenizer,
        eos_ids=token_ids(end, "tokenizer.ggml.eos_token_id", config.vocab_size),
        template=template,
        compute_dtype=compute,
    )
