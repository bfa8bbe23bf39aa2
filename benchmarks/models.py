"""Models for benchmarks: what load_engine_source names, or "random:SHAPE", randomly initialised.

A random model computes as fast as a trained one of its shape and needs no file. Its answers
mean nothing. Shapes: "4b" (36 layers, routed from 18 on, as the published 4B models), "default"
(the default model's), "135m" (its base, routed as the 4B models are) and "tiny" (for tests).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from model_adapter.checkpoints import load_engine_source
from model_adapter.checkpoints.vocabulary import base_template
from model_adapter.msa.config import (
    TORCH_DTYPE,
    ComputeDtype,
    LayerChoice,
    LoadedModel,
    ModelConfig,
    MsaConfig,
)
from storage.paths import DataFolder

SHAPES = {
    "4b": ModelConfig(
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        attention_bias=False,
        hidden_size=2560,
        intermediate_size=9728,
        num_layers=36,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        rope_theta=5e6,
        max_positions=32768,
        vocab_size=151936,
        qk_norm=True,
        msa=MsaConfig(tuple(range(18, 36)), aux_loss_method="INFONCE_DECOUPLE"),
    ),
    "135m": ModelConfig(
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        attention_bias=False,
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        rope_theta=1e5,
        max_positions=8192,
        vocab_size=49152,
        qk_norm=False,
        msa=MsaConfig(tuple(range(15, 30)), aux_loss_method="INFONCE_DECOUPLE"),
    ),
    "tiny": ModelConfig(
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        attention_bias=False,
        hidden_size=64,
        intermediate_size=128,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        rope_theta=1e4,
        max_positions=2048,
        vocab_size=512,
        qk_norm=True,
        msa=MsaConfig((2, 3), aux_loss_method="INFONCE_DECOUPLE"),
    ),
}
SHAPES["default"] = replace(
    SHAPES["135m"],
    msa=MsaConfig(tuple(range(18, 30)), pool_tokens=32, layer_choice=LayerChoice.COMBINED),
)


def load(
    spec: str, data: DataFolder, dtype: str, device: torch.device, adapter: str = "auto"
) -> LoadedModel:
    """A model without tokens that end an answer: every answer is as long as was asked for."""
    name, _, shape = spec.partition(":")
    if name != "random":
        return replace(load_engine_source(spec, data, dtype, adapter), eos_ids=())
    config, tokenizer = SHAPES[shape], byte_tokenizer(SHAPES[shape].vocab_size)
    compute: ComputeDtype = "fp32" if dtype == "fp32" else "bf16"
    generator = torch.Generator(device).manual_seed(0)
    weights = {
        key: torch.randn(size, generator=generator, device=device, dtype=TORCH_DTYPE[compute]).mul_(
            size[-1] ** -0.5
        )
        if len(size) > 1
        else torch.ones(size, device=device, dtype=TORCH_DTYPE[compute])
        for key, size in parameters(config)
    }
    return LoadedModel(
        model_id=f"random-{shape}",
        display_name=spec,
        identity=hashlib.sha256(spec.encode()).hexdigest(),
        config=config,
        weights=weights,
        tokenizer=tokenizer,
        eos_ids=(),
        template=base_template(tokenizer, trained=False),
        compute_dtype=compute,
    )


def parameters(c: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Published names and shapes."""
    wide, narrow = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    yield "model.embed_tokens.weight", (c.vocab_size, c.hidden_size)
    yield "model.norm.weight", (c.hidden_size,)
    for index in range(c.num_layers):
        base = f"model.layers.{index}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{base}{name}.weight", (c.hidden_size,)
        sizes = {"q_proj": wide, "k_proj": narrow, "v_proj": narrow}
        if index in c.msa.routed_layers:
            sizes |= {"router_q_proj.0": wide, "router_k_proj.0": narrow}
        for name, size in sizes.items():
            yield f"{base}self_attn.{name}.weight", (size, c.hidden_size)
        yield f"{base}self_attn.o_proj.weight", (c.hidden_size, wide)
        if c.qk_norm:
            yield f"{base}self_attn.q_norm.weight", (c.head_dim,)
            yield f"{base}self_attn.k_norm.weight", (c.head_dim,)
        yield f"{base}mlp.gate_proj.weight", (c.intermediate_size, c.hidden_size)
        yield f"{base}mlp.up_proj.weight", (c.intermediate_size, c.hidden_size)
        yield f"{base}mlp.down_proj.weight", (c.hidden_size, c.intermediate_size)


def byte_tokenizer(size: int) -> Tokenizer:
    """A token a byte, the control tokens of a chat, and between them names that no text has, so
    that every one of `size` tokens that a model may write is text."""
    controls = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_end|>")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*letters, *(f"token{n}" for n in range(len(letters), size - len(controls)))]
    tokenizer = Tokenizer(models.BPE({name: n for n, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in controls])
    return tokenizer
