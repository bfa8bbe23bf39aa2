"""The kernel that fetches: rows of layers from wherever they lie, in device or pinned memory."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=("rows", "layer", "layers"))
def fetch_rows(
    table: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    layer: tl.tensor,
    layers: tl.tensor,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Rows of WORDS 64-bit words of so many layers, from `layer` on, into `out`, [layers, rows,
    WORDS].

    table: int64 [rows, 2], the address of each row in layer 0, and the bytes from one layer to the
    next. Programs take rows in turn, however many of both there are.
    """
    for place in range(tl.program_id(0), layers * rows, tl.num_programs(0)):
        row, at = place % rows, layer + place // rows
        first, step = tl.load(table + row * 2), tl.load(table + row * 2 + 1)
        source = (first + at * step).to(tl.pointer_type(tl.int64))
        for start in range(0, WORDS, BLOCK):
            word = start + tl.arange(0, BLOCK)
            inside = word < WORDS
            tl.store(out + place * WORDS + word, tl.load(source + word, mask=inside), mask=inside)
