"""Model identity: the hash under which a model's KV blocks are stored.

It is computed from what was loaded, at every load, never read from a file: a changed weight,
whatever a cache says, makes a new identity. SHA-256 reads more than a gigabyte a second, so a
small model costs a fraction of a second.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import Any

import torch

from model_adapter.checkpoints.weights import Weights
from model_adapter.msa.config import ComputeDtype, ModelConfig
from model_adapter.msa.prompt import Template
from storage.documents import RENDER_VERSION
from storage.records import FORMAT_VERSION

#: To be raised when the engine encodes the same document to other blocks: another document
#: format, another arithmetic beyond rounding, another meaning of a block's arrays.
ENCODING_VERSION = 1


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def hash_weights(weights: Weights) -> str:
    """64 hex digits over names, types, shapes and contents; how they were sharded is not in it."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].contiguous()
        digest.update(_canonical([name, str(tensor.dtype), list(tensor.shape)]))
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _block_settings(config: ModelConfig) -> dict[str, Any]:
    settings = asdict(config)
    msa = config.msa
    # How scores are reduced and how many documents are taken is decided when a block is read.
    settings["msa"] = {
        "routed_layers": msa.routed_layers,
        "pool_tokens": msa.pool_tokens,
        "decouple_router": msa.decouple_router,
        "cosine": msa.cosine,
    }
    return settings


def model_identity(
    config: ModelConfig,
    weights: Weights,
    tokenizer_content: bytes,
    template: Template,
    dtype: ComputeDtype,
    *,
    adapter_digest: str = "",
) -> str:
    """64 hex digits over all that shapes a block.

    `weights` in the type they are computed with; `tokenizer_content`: canonical bytes of the
    tokenizer, such as its tokenizer.json. A base with an adapter is hashed as the base's
    weights and `adapter_digest`, not as merged: the last bits of a merge differ between
    processors, and the identity of a model must not. Settings that only matter when blocks are read
    (reductions, top_k, how answers are made) are left out: changing them keeps blocks valid.
    """
    parts: dict[str, Any] = {
        "encoding_version": ENCODING_VERSION,
        "render_version": RENDER_VERSION,
        "block_format_version": FORMAT_VERSION,
        "config": _block_settings(config),
        "layout": asdict(config.layout(dtype)),
        "document": {"start": template.turn_start, "end": template.turn_end},
        "tokenizer": hashlib.sha256(tokenizer_content).hexdigest(),
        "weights": hash_weights(weights),
    }
    if adapter_digest:
        parts["adapter"] = adapter_digest
    return hashlib.sha256(_canonical(parts)).hexdigest()
