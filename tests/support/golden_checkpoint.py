"""The golden vectors' tiny checkpoint, made again from its seed.

Its weights are random numbers, so instead of 3.4 MB of them the repository holds the
recipe: normal draws in the order of sorted names, scaled by fan-in, and router queries
made of the router keys that they should find, plus noise. The result is bit-equal to
the checkpoint that the vectors were made with (WEIGHTS_SHA256); a machine whose normal
generator rounds otherwise would differ by an ulp, far below the tolerances.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

GOLDEN = Path(__file__).parents[1] / "golden"
SEED = 20240607
WEIGHTS_SHA256 = "228e09b93b850daa7273a881e5a0d101f4c08c83ae5c605b97f7201879c7a969"
HIDDEN, INTER, LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 128, 256, 4, 4, 2, 32, 791
ROUTED = (2, 3)


def _shapes() -> dict[str, tuple[int, ...]]:
    wide, narrow = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {
        "lm_head.weight": (VOCAB, HIDDEN),
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for index in range(LAYERS):
        base = f"model.layers.{index}."
        attention = f"{base}self_attn."
        shapes |= {
            f"{base}input_layernorm.weight": (HIDDEN,),
            f"{base}post_attention_layernorm.weight": (HIDDEN,),
            f"{base}mlp.gate_proj.weight": (INTER, HIDDEN),
            f"{base}mlp.up_proj.weight": (INTER, HIDDEN),
            f"{base}mlp.down_proj.weight": (HIDDEN, INTER),
            f"{attention}q_proj.weight": (wide, HIDDEN),
            f"{attention}k_proj.weight": (narrow, HIDDEN),
            f"{attention}v_proj.weight": (narrow, HIDDEN),
            f"{attention}o_proj.weight": (HIDDEN, wide),
            f"{attention}q_norm.weight": (HEAD_DIM,),
            f"{attention}k_norm.weight": (HEAD_DIM,),
        }
        if index in ROUTED:
            shapes[f"{attention}router_q_proj.0.weight"] = (wide, HIDDEN)
            shapes[f"{attention}router_k_proj.0.weight"] = (narrow, HIDDEN)
    return shapes


def golden_weights() -> dict[str, torch.Tensor]:
    """The fp32 checkpoint's parameters."""
    generator = torch.Generator().manual_seed(SEED)
    weights: dict[str, torch.Tensor] = {}
    for name, shape in sorted(_shapes().items()):
        draw = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            draw = 1.0 + 0.2 * draw
            weights[name] = draw * 1.5 if "self_attn" in name else draw
        elif "embed" in name:
            weights[name] = draw
        else:
            gain = 2.0 if name == "lm_head.weight" else 1.0
            if "q_proj" in name or "k_proj" in name:
                gain = 1.6
            weights[name] = draw * (gain / math.sqrt(shape[1]))
    for index in ROUTED:
        attention = f"model.layers.{index}.self_attn."
        keys = weights[f"{attention}router_k_proj.0.weight"].view(KV_HEADS, HEAD_DIM, HIDDEN)
        shared = keys.repeat_interleave(HEADS // KV_HEADS, dim=0).reshape(-1, HIDDEN)
        noise = torch.randn(shared.shape, generator=generator)
        weights[f"{attention}router_q_proj.0.weight"] = shared + 0.5 * noise / math.sqrt(HIDDEN)
    return weights


def digest(weights: dict[str, torch.Tensor]) -> str:
    """SHA-256 over names and contents."""
    found = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        found.update(name.encode() + tensor.numpy().tobytes())
    return found.hexdigest()


def write_checkpoint(folder: Path, dtype: torch.dtype) -> None:
    """A directory in the published format."""
    shutil.copytree(GOLDEN / "checkpoint", folder)
    config = json.loads((folder / "config.json").read_text())
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config))
    weights = {name: tensor.to(dtype) for name, tensor in golden_weights().items()}
    weights["temperature"] = torch.tensor(0.1).to(dtype)
    save_file(weights, folder / "model.safetensors")


def write_golden(folder: Path) -> None:
    """The whole golden directory, checkpoints included, as the parity command takes it."""
    shutil.copytree(GOLDEN / "vectors", folder, dirs_exist_ok=True)
    write_checkpoint(folder / "ckpt_fp32", torch.float32)
    write_checkpoint(folder / "ckpt_bf16", torch.bfloat16)
