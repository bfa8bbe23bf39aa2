"""Directories in the published MSA format, or of a plain Llama-type or Qwen3-type base."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch

from model_adapter.checkpoints.adapter import Adapter, check_base, fit, merge
from model_adapter.checkpoints.errors import (
    CheckpointNotFoundError,
    InvalidConfigError,
    UnsupportedCheckpointError,
)
from model_adapter.checkpoints.identity import model_identity
from model_adapter.checkpoints.routing import attention_routing, with_value_routers
from model_adapter.checkpoints.values import Object, read_object, token_ids
from model_adapter.checkpoints.vocabulary import (
    TURN_END,
    base_template,
    check_vocabulary,
    published_template,
    read_tokenizer,
)
from model_adapter.checkpoints.weights import open_tensors, read_weights, stored_dtype
from model_adapter.msa.config import (
    MAX_LAYERS,
    TORCH_DTYPE,
    ComputeDtype,
    ConfigError,
    LoadedModel,
    ModelConfig,
)

DTYPE_CHOICES = ("auto", *TORCH_DTYPE)


def model_id_of(name: str) -> str:
    """A resource id made of a file or folder name: lower case letters, digits and hyphens."""
    words = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:63].strip("-")
    if not words:
        return "model"
    return words if words[0].isalpha() else f"m-{words}"[:63].strip("-")


def resolve_dtype(asked: str, stored: torch.dtype) -> ComputeDtype:
    """What to compute in: as asked or, for "auto", fp32 for fp32 weights and bf16 otherwise.

    fp16 weights are run in bf16, because CPUs have no fast fp16. Raises InvalidConfigError.
    """
    if asked == "auto":
        return "fp32" if stored == torch.float32 else "bf16"
    if asked == "fp32":
        return "fp32"
    if asked == "bf16":
        return "bf16"
    raise InvalidConfigError(f"dtype {asked!r:.40} is none of {', '.join(DTYPE_CHOICES)}")


def parse_config(raw: Object) -> ModelConfig:
    """A config.json as the engine runs it, routing by attention keys where it has no msa_config.

    Raises UnsupportedCheckpointError, InvalidConfigError.
    """
    architectures = raw.get("architectures", [])
    for name in architectures if isinstance(architectures, list) else [architectures]:
        if name not in ("MSAForCausalLM", "Qwen3ForCausalLM", "LlamaForCausalLM"):
            raise UnsupportedCheckpointError(f"architecture {name!r:.80} is not run here")
    if raw.get("model_type") not in ("msa", "qwen3", "llama"):
        raise UnsupportedCheckpointError(
            f"model_type {raw.get('model_type')!r:.80} is none of msa, qwen3, llama"
        )
    if "quantization_config" in raw:
        raise UnsupportedCheckpointError("quantised safetensors are not read; give the originals")
    if raw["model_type"] == "msa" and "msa_config" not in raw:
        raise InvalidConfigError("model_type is msa, but there is no msa_config")
    for key in ("rope_scaling", "partial_rotary_factor"):
        if raw.get(key) not in (None, 1, 1.0):
            raise UnsupportedCheckpointError(f"{key} is {raw[key]!r:.80}, which is not supported")
    msa = None
    if "msa_config" not in raw:
        layers = raw.get("num_hidden_layers")
        if type(layers) is not int or not 1 <= layers <= MAX_LAYERS:
            raise InvalidConfigError(f"num_hidden_layers is {layers!r:.40}")
        msa = attention_routing(layers)
    try:
        config = ModelConfig.parse(raw, msa)
    except ConfigError as error:
        raise InvalidConfigError(f"config.json: {error}") from error
    if not math.isfinite(config.rope_theta):
        raise InvalidConfigError("config.json: rope_theta is not finite")
    return config


def _eos_ids(folder: Path, raw: Object, config: ModelConfig, tokenizer: Any) -> tuple[int, ...]:
    path = folder / "generation_config.json"
    generation = read_object(path) if path.is_file() else {}
    value = generation.get("eos_token_id", raw.get("eos_token_id"))
    if value is not None:
        return token_ids(value, "eos_token_id", config.vocab_size)
    end = tokenizer.token_to_id(TURN_END)
    if end is None:
        raise InvalidConfigError("no eos_token_id in generation_config.json or config.json")
    return (end,)


def load_directory(
    folder: Path, dtype: str = "auto", adapter: Adapter | None = None
) -> LoadedModel:
    """Loads config.json, generation_config.json, tokenizer.json and safetensors.

    `dtype`: auto, bf16 or fp32. Other files, code and pickles among them, are never opened.
    adapter: merged in, in place of value routers; it must have been trained on these files.
    Raises CheckpointError.
    """
    if not folder.is_dir():
        raise CheckpointNotFoundError(f"no directory {folder}")
    raw = read_object(folder / "config.json")
    config = routed = parse_config(raw)
    if adapter is not None:
        if "msa_config" in raw:
            raise UnsupportedCheckpointError(
                f"{folder.name} has routers of its own; an adapter goes on a base without"
            )
        check_base(adapter, folder)
        routed = fit(adapter, config, str(raw["model_type"]))
    tokenizer, content = read_tokenizer(folder / "tokenizer.json")
    check_vocabulary(tokenizer, config.vocab_size)
    published = "msa_config" in raw
    template = (
        published_template(tokenizer)
        if published
        else base_template(tokenizer, trained=adapter is not None)
    )
    eos_ids = _eos_ids(folder, raw, config, tokenizer)
    with open_tensors(folder) as handles:
        embedding = "model.embed_tokens.weight"
        stored = stored_dtype(handles, embedding) if embedding in handles else torch.bfloat16
        compute = resolve_dtype(dtype, stored)
        weights = read_weights(handles, config, TORCH_DTYPE[compute])
    name, digest = folder.resolve().name, ""
    if adapter is not None:
        name, digest = adapter.header.model_name, adapter.digest
    elif not published:
        routed = with_value_routers(config, weights)
    identity = model_identity(routed, weights, content, template, compute, adapter_digest=digest)
    if adapter is not None:
        merge(adapter, routed, weights)
    return LoadedModel(
        model_id=model_id_of(name),
        display_name=name,
        identity=identity,
        config=routed,
        weights=weights,
        tokenizer=tokenizer,
        eos_ids=eos_ids,
        template=template,
        compute_dtype=compute,
    )
