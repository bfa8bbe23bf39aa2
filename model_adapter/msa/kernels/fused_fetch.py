"""The kernel that fetches: rows from wherever they lie, device or pinned memory, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=("rows", "layer"))
def fetch_rows(
    table: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    layer: tl.tensor,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Rows of WORDS 64-bit words into `out`, [rows, WORDS].

    table: int64 [rows, 2], the address of each row in layer 0, and the bytes from one layer to the
    next. Programs take rows in turn, however many of both there are.
    """
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        first, step = tl.load(table + row * 2), tl.load(table + row * 2 + 1)
        source = (first + layer * step).to(tl.pointer_type(tl.int64))
        target = out + row * WORDS
        for start in range(0, WORDS, BLOCK):
            word = start + tl.arange(0, BLOCK)
            tl.store(target + word, tl.load(source + word, mask=word < WORDS), mask=word < WORDS)
