"""Cuts the golden vectors in this folder out of the full set: python -m tests.golden.make DIR.

The full set is 13 MB. What stays is every kind of file and every variant, with fewer
questions and decoding steps; nothing is computed here, only left out.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

VECTORS = Path(__file__).parent / "vectors"
#: Tensors that are left out everywhere.
LEFT_OUT = re.compile(r"prefill_logits|hidden\.(attn|layer[01]|embed)|layer[01]\.compact")
#: File stem: questions kept, decoding steps kept.
LEFT_OUT = re.compile(r"prefill_logits|hidden\.(attn|layer[01]|embed)|layer[01]\.compact")
ONESHOT = {
    "oneshot_fp32_k4_exactpool": (6, 12),
    "oneshot_fp32_k4": (1, 4),
    "oneshot_fp32_k2": (2, 8),
    "oneshot_bf16_k4": (3, 8),
}
WHOLE = (
    "docs.json", "queries.json", "variants.json", "memory_fp32_exactpool.safetensors",
    "memory_bf16.safetensors", "interleave.json", "interleave.safetensors",
    "injection_fp32_k4.safetensors",
)  # fmt: skip


def cut_oneshot(source: Path, stem: str, questions: int, steps: int) -> None:
    entries: list[dict[str, Any]] = json.loads((source / f"{stem}.json").read_text())[:questions]
    for entry in entries:
        entry["tokens"] = entry["tokens"][:steps]
        del entry["text"]
    (VECTORS / f"{stem}.json").write_text(json.dumps(entries, separators=(",", ":")))
    kept = {}
    for name, tensor in load_file(source / f"{stem}.safetensors").items():
        if int(name[1 : name.index(".")]) < questions and not LEFT_OUT.search(name):
            kept[name] = (tensor[:steps] if name.endswith("step_logits") else tensor).clone()
    save_file(kept, VECTORS / f"{stem}.safetensors")


def cut_batch(source: Path, steps: int) -> None:
    tensors = load_file(source / "batch_fp32_k4.safetensors")
    for name in ("tokens", "step_logits"):
        tensors[name] = tensors[name][:, :steps].clone()
    save_file(tensors, VECTORS / "batch_fp32_k4.safetensors")


def cut_others(source: Path) -> None:
    hidden = load_file(source / "stage1_hidden_fp32.safetensors")
    kept = {n: t for n, t in hidden.items() if n.startswith("template") or n.startswith("doc3.rk")}
    save_file(
        kept | {"doc3.layer3": hidden["doc3.layer3"]}, VECTORS / "stage1_hidden_fp32.safetensors"
    )
    pooled = load_file(source / "memory_var_infonce.safetensors")
    kept = {name: tensor for name, tensor in pooled.items() if name.endswith(".rk")}
    save_file(kept | {"layer2.k": pooled["layer2.k"]}, VECTORS / "memory_var_infonce.safetensors")


def main(source: Path) -> None:
    shutil.rmtree(VECTORS, ignore_errors=True)
    VECTORS.mkdir()
    for name in WHOLE:
        shutil.copyfile(source / name, VECTORS / name)
    for name in ("interleave.json", "docs.json"):
        content = json.loads((VECTORS / name).read_text())
        (VECTORS / name).write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")))
    cuts = dict(ONESHOT)
    for path in sorted(source.glob("oneshot_var_*.json")):
        cuts[path.stem] = (1, 8)
    for stem, (questions, steps) in cuts.items():
        cut_oneshot(source, stem, questions, steps)
    cut_batch(source, steps=3)
    cut_others(source)
    checkpoint = Path(__file__).parent / "checkpoint"
    checkpoint.mkdir(exist_ok=True)
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        shutil.copyfile(source / "ckpt_fp32" / name, checkpoint / name)


if __name__ == "__main__":
    with torch.inference_mode():
        main(Path(sys.argv[1]))
