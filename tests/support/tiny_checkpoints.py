"""Tiny random checkpoints written in full: a published directory, a plain base, a GGUF file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from model_adapter.checkpoints.directory import parse_config
from model_adapter.checkpoints.weights import expected_shapes
from model_adapter.msa.config import ModelConfig

LAYERS, HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM = 3, 32, 64, 4, 2, 8

CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PUBLISHED = (*CHATML, "<|object_ref_end|>")
SMOL = (*CHATML, "<file_sep>", "<issue_closed>")

_TEXT = (
    "user and assistant talk about the weather in the north",
    "the garden, the dog and 12 letters that were written in 1999",
    "it's what they'd said: we'll see the sea, won't we?",
)


def tiny_tokenizer(special: tuple[str, ...] = PUBLISHED) -> Tokenizer:
    """A byte-level BPE trained on a few sentences; special tokens have the first ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[AddedToken(name, special=True, normalized=False) for name in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT * 4, trainer)
    return tokenizer


def tiny_config(kind: str = "msa", **changes: Any) -> dict[str, Any]:
    """config.json of kind msa, qwen3 or llama."""
    architecture = {"msa": "MSA", "qwen3": "Qwen3", "llama": "Llama"}[kind]
    config: dict[str, Any] = {
        "architectures": [f"{architecture}ForCausalLM"],
        "model_type": kind,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "vocab_size": 400,
        "eos_token_id": 2,
    }
    if kind == "msa":
        config["msa_config"] = {
            "router_layer_idx": "1,2",
            "pooling_kernel_size": 16,
            "decouple_router": True,
            "aux_loss_method": "INFONCE_DECOUPLE",
        }
    return {**config, **changes}


def random_weights(
    config: ModelConfig, dtype: torch.dtype, seed: int = 7
) -> dict[str, torch.Tensor]:
    """Every tensor that the configuration asks for."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(shape, generator=generator) * 0.05).to(dtype)
        for name, shape in expected_shapes(config).items()
    }


def write_directory(
    folder: Path,
    config: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
    special: tuple[str, ...] = PUBLISHED,
    shards: int = 1,
) -> dict[str, torch.Tensor]:
    """Writes a whole checkpoint directory and returns its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    (folder / "tokenizer.json").write_text(tiny_tokenizer(special).to_str())
    weights = random_weights(parse_config(dict(config)), dtype)
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return weights
    names = sorted(weights)
    index: dict[str, str] = {}
    for shard in range(shards):
        file_name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = names[shard::shards]
        save_file({name: weights[name] for name in part}, folder / file_name)
        index.update(dict.fromkeys(part, file_name))
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    return weights


def rope_order(values: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Rows as a GGUF of the llama architecture holds them, row by row from the definition."""
    dim = values.shape[0] // heads
    ordered = np.empty_like(values)
    for head in range(heads):
        for pair in range(dim // 2):
            ordered[head * dim + 2 * pair] = values[head * dim + pair]
            ordered[head * dim + 2 * pair + 1] = values[head * dim + dim // 2 + pair]
    return ordered


_GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_name(name: str) -> str:
    """The GGUF name of a published tensor name."""
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem, kind = name.rsplit(".", 1)
    if stem in top:
        return f"{top[stem]}.{kind}"
    _, _, layer, inner = stem.split(".", 3)
    return f"blk.{layer}.{_GGUF_NAMES[inner]}.{kind}"


def write_gguf(
    path: Path,
    kind: str = "llama",
    tied: bool = True,
    quant: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    metadata: Mapping[str, Any] | None = None,
    pre: str = "smollm",
    drop: str = "",
) -> tuple[dict[str, torch.Tensor], Tokenizer]:
    """Writes a GGUF model with its tokenizer; returns the published weights and tokenizer.

    `metadata` adds or replaces uint32 and string values; `drop` leaves out one tensor.
    """
    config = parse_config(tiny_config(kind, tie_word_embeddings=tied))
    weights = random_weights(config, torch.float32)
    tokenizer = tiny_tokenizer(SMOL)
    writer = gguf.GGUFWriter(path, kind)
    values: dict[str, Any] = {
        "block_count": LAYERS,
        "context_length": 2048,
        "embedding_length": HIDDEN,
        "feed_forward_length": INNER,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.key_length": HEAD_DIM,
        "attention.value_length": HEAD_DIM,
    }
    extra = dict(metadata or {})
    for key, value in {
        **{f"{kind}.{key}": value for key, value in values.items()},
        **extra,
    }.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_uint32(key, value)
    writer.add_float32(f"{kind}.rope.freq_base", 10000.0)
    writer.add_float32(f"{kind}.attention.layer_norm_rms_epsilon", 1e-6)
    add_tokenizer(writer, tokenizer, pre)
    for name, tensor in weights.items():
        if name == drop:
            continue
        data = tensor.numpy()
        if kind == "llama" and ("q_proj" in name or "k_proj" in name):
            data = rope_order(data, HEADS if "q_proj" in name else KV_HEADS)
        if data.ndim > 1 and quant != gguf.GGMLQuantizationType.F32:
            writer.add_tensor(gguf_name(name), gguf.quantize(data, quant), raw_dtype=quant)
        else:
            writer.add_tensor(gguf_name(name), data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights, tokenizer


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer, pre: str) -> None:
    """tokenizer.ggml.* of a byte-level BPE."""
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([token for token, _ in vocab])
    writer.add_token_types(
        [
            gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL
            for token, _ in vocab
        ]
    )
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_eos_token_id(2)
