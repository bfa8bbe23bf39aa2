"""Compiles the kernels for a Hopper GPU, without one: python -m tests.support.compile_kernels.

The interpreter runs what a compiler refuses, and knows nothing of shared memory or of how wide a
load is. Not to be imported where TRITON_INTERPRET is set.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from model_adapter.msa.kernels import KeyFormat, KeyStorage, fused, fused_best, fused_fetch
from model_adapter.msa.kernels.launches import way_of

HOPPER = GPUTarget("cuda", 90, 32)
#: Of a program, in bytes.
MOST_SHARED = 227 * 1024


def compiled(
    kernel: Any, pointers: dict[str, str], constants: dict[str, Any], **options: int
) -> Any:
    """pointers, constants: by name of the kernel's arguments; the others are integers."""
    kinds = {**pointers, **dict.fromkeys(constants, "constexpr")}
    signature = {name: kinds.get(name, "i32") for name in kernel.arg_names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(signature)
        if name in pointers
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=HOPPER, options=options)


def score_tiles(to: KeyFormat, rows: int, tokens: int, width: int = 1024, group: int = 128) -> None:
    """As it is launched for bf16 keys, or integers of them."""
    cpu = torch.device("cpu")
    keys = KeyStorage(to, group).empty((1, 1, width), torch.bfloat16, cpu).layer(0)
    way = way_of(keys, rows)
    kind = "*bf16" if to is KeyFormat.FLOAT else "*i8"
    pointers = dict.fromkeys(("parts", "values", "scales", "documents"), "*i64")
    pointers |= dict.fromkeys(("row_scale", "row_bias", "scores"), "*fp32")
    pointers |= {"tiles": "*i32", "high": kind, "low": kind}
    bits = {KeyFormat.FLOAT: 0, KeyFormat.INT8: 8, KeyFormat.INT4: 4}[to]
    constants = {"WIDTH": width, "GROUP": way.group, "CHUNKS": 128}
    constants |= {"FORMAT": bits, "TWO_PARTS": True, "ASSEMBLY": True}
    constants |= {"QUESTIONS": rows // tokens, "TOKENS": tokens}
    options = {"num_warps": way.warps, "num_stages": way.stages}
    made = compiled(fused.score_tiles, pointers, constants, **options)
    assert made.metadata.shared <= MOST_SHARED, (to, rows, made.metadata.shared)
    assert "wgmma" in made.asm["ptx"], "on the matrix units"
    assert "cp.async" in made.asm["ptx"], "wide loads, several under way"


def best_documents(merged: int, kept: int) -> None:
    pointers = {"scores": "*fp32", "questions": "*i64", "found": "*i64"}
    pointers |= {"done": "*i32", "best": "*i64"}
    constants = {"BLOCK": 4096, "MERGED": merged, "K": kept}
    compiled(fused_best.best_documents, pointers, constants, num_warps=8)


def fetch_rows(words: int, block: int) -> None:
    pointers = {"table": "*i64", "out": "*i64"}
    compiled(fused_fetch.fetch_rows, pointers, {"WORDS": words, "BLOCK": block}, num_warps=4)


def main() -> None:
    score_tiles(KeyFormat.FLOAT, 256, 16)
    score_tiles(KeyFormat.INT4, 32, 32)
    best_documents(2048, 16)
    fetch_rows(256, 256)
    fetch_rows(600, 512)


if __name__ == "__main__":
    main()
