"""The kernels. One program scores one tile of chunks for all questions of its memory.

The keys of a tile are read once from device memory (again from the cache, for every
further block of questions), multiplied with the voting tokens on the matrix units,
reduced over tokens in registers, then over the chunks of each document by a segmented
scan, and one number per document and question is written.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: Below the key of every document.
_LOWEST = tl.constexpr(-0x8000000000000000)


@triton.jit
def _rows(
    base: tl.tensor, at_row: tl.tensor, dims: tl.tensor, asked: tl.tensor, WIDTH: tl.constexpr
) -> tl.tensor:
    """[dims, rows] of a question matrix; zeros for rows of no question."""
    return tl.load(base + at_row[None, :] * WIDTH + dims[:, None], mask=asked[None, :], other=0)


@triton.jit
def _float_group(
    total: tl.tensor,
    keys: tl.tensor,
    at: tl.tensor,
    inside: tl.tensor,
    high: tl.tensor,
    low: tl.tensor,
    at_row: tl.tensor,
    asked: tl.tensor,
    start: tl.tensor,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    TWO_PARTS: tl.constexpr,
) -> tl.tensor:
    """total plus the products of one group of dimensions, float keys."""
    dims = start + tl.arange(0, GROUP)
    key = tl.load(keys + at[:, None] * WIDTH + dims[None, :], mask=inside[:, None], other=0)
    high_part = _rows(high, at_row, dims, asked, WIDTH)
    total = tl.dot(key, high_part, total, input_precision="ieee")
    if TWO_PARTS:
        low_part = _rows(low, at_row, dims, asked, WIDTH)
        total = tl.dot(key, low_part, total, input_precision="ieee")
    return total


@triton.jit
def _int8_group(
    keys: tl.tensor,
    at: tl.tensor,
    inside: tl.tensor,
    part: tl.tensor,
    at_row: tl.tensor,
    asked: tl.tensor,
    start: tl.tensor,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
) -> tl.tensor:
    """int32 products of one group with one part of the questions."""
    dims = start + tl.arange(0, GROUP)
    key = tl.load(keys + at[:, None] * WIDTH + dims[None, :], mask=inside[:, None], other=0)
    return tl.dot(key, _rows(part, at_row, dims, asked, WIDTH), out_dtype=tl.int32)


@triton.jit
def _int4_group(
    keys: tl.tensor,
    at: tl.tensor,
    inside: tl.tensor,
    part: tl.tensor,
    at_row: tl.tensor,
    asked: tl.tensor,
    start: tl.tensor,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
) -> tl.tensor:
    """As _int8_group: a byte holds a dimension of the group's first half and one of its last."""
    half = tl.arange(0, GROUP // 2)
    at_byte = at[:, None] * (WIDTH // 2) + start // 2 + half[None, :]
    packed = tl.load(keys + at_byte, mask=inside[:, None], other=0)
    near, far = start + half, start + half + GROUP // 2
    lower = (packed & 15).to(tl.int8) - 8
    upper = (packed >> 4).to(tl.int8) - 8
    product = tl.dot(lower, _rows(part, at_row, near, asked, WIDTH), out_dtype=tl.int32)
    return product + tl.dot(upper, _rows(part, at_row, far, asked, WIDTH), out_dtype=tl.int32)


@triton.jit
def _products(
    keys: tl.tensor,
    scale: tl.tensor,
    at: tl.tensor,
    inside: tl.tensor,
    high: tl.tensor,
    low: tl.tensor,
    row_scale: tl.tensor,
    at_row: tl.tensor,
    asked: tl.tensor,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    FORMAT: tl.constexpr,
    TWO_PARTS: tl.constexpr,
) -> tl.tensor:
    """fp32 [CHUNKS, ROWS]."""
    total = tl.zeros((CHUNKS, ROWS), dtype=tl.float32)
    for start in range(0, WIDTH, GROUP):
        if FORMAT == 0:
            total = _float_group(
                total, keys, at, inside, high, low, at_row, asked, start, WIDTH, GROUP, TWO_PARTS
            )
        else:
            if FORMAT == 8:
                first = _int8_group(keys, at, inside, high, at_row, asked, start, WIDTH, GROUP)
                rest = _int8_group(keys, at, inside, low, at_row, asked, start, WIDTH, GROUP)
            else:
                first = _int4_group(keys, at, inside, high, at_row, asked, start, WIDTH, GROUP)
                rest = _int4_group(keys, at, inside, low, at_row, asked, start, WIDTH, GROUP)
            at_scale = at * (WIDTH // GROUP) + start // GROUP
            unit = tl.load(scale + at_scale, mask=inside, other=0)
            # 254: rows.LOW_UNIT.
            total += (first.to(tl.float32) + rest.to(tl.float32) * (1.0 / 254.0)) * unit[:, None]
    if FORMAT != 0:
        total *= tl.load(row_scale + at_row, mask=asked, other=0)[None, :]
    return total


@triton.jit
def _later_segment(
    document: tl.tensor, value: tl.tensor, next_document: tl.tensor, next_value: tl.tensor
) -> tl.tensor:
    """Running maximum that starts anew with each document."""
    same = document == next_document
    return next_document, tl.where(same, tl.maximum(value, next_value), next_value)


@triton.jit
def score_tiles(
    tiles: tl.tensor,
    parts: tl.tensor,
    values: tl.tensor,
    scales: tl.tensor,
    documents: tl.tensor,
    high: tl.tensor,
    low: tl.tensor,
    row_scale: tl.tensor,
    row_bias: tl.tensor,
    scores: tl.tensor,
    pieces: tl.tensor,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNKS: tl.constexpr,
    QUESTIONS: tl.constexpr,
    TOKENS: tl.constexpr,
    FORMAT: tl.constexpr,
    TWO_PARTS: tl.constexpr,
) -> None:
    """values, scales, documents: int64 addresses, one per part. FORMAT: bits of integer
    keys (8, 4), or 0 with `high` in the keys' own float type. QUESTIONS: scored at once.
    pieces: that a question's rows come in, of TOKENS each; QUESTIONS is 1 if there are several."""
    tile = tiles + tl.program_id(0) * 4
    part, first = tl.load(tile).to(tl.int64), tl.load(tile + 1)
    count, shared = tl.load(tile + 2), tl.load(tile + 3)
    table = parts + part * 4
    first_question, questions = tl.load(table), tl.load(table + 1)
    first_score, document_count = tl.load(table + 2), tl.load(table + 3)

    chunk = tl.arange(0, CHUNKS)
    inside = chunk < count
    at = (first + chunk).to(tl.int64)
    owner = tl.load(documents + part).to(tl.pointer_type(tl.int32))
    document = tl.load(owner + at, mask=inside, other=-1)
    following = tl.load(owner + at + 1, mask=chunk + 1 < count, other=-1)
    ends = inside & (document != following) & (document >= 0)
    owner_cb = tl.broadcast_to(document[:, None], (CHUNKS, QUESTIONS))

    address = tl.load(values + part)
    if FORMAT == 0:
        keys = address.to(tl.pointer_type(high.dtype.element_ty))
    elif FORMAT == 8:
        keys = address.to(tl.pointer_type(tl.int8))
    else:
        keys = address.to(tl.pointer_type(tl.uint8))
    # Tensors begin at multiples of 16 bytes, which the compiler can't know of an address.
    keys = tl.multiple_of(keys, 16)
    scale = tl.multiple_of(tl.load(scales + part).to(tl.pointer_type(tl.float32)), 16)

    row = tl.arange(0, QUESTIONS * TOKENS)
    for block in range(0, questions * pieces, QUESTIONS):
        asked = row < (questions * pieces - block) * TOKENS
        at_row = (first_question * pieces + block) * TOKENS + row
        total = _products(
            keys, scale, at, inside, high, low, row_scale, at_row, asked,
            CHUNKS, QUESTIONS * TOKENS, WIDTH, GROUP, FORMAT, TWO_PARTS,
        )  # fmt: skip
        total += tl.load(row_bias + at_row, mask=asked, other=0)[None, :]
        # [CHUNKS, QUESTIONS]: over tokens, then over the chunks of a document so far.
        best = tl.max(tl.reshape(total, (CHUNKS, QUESTIONS, TOKENS)), axis=2)
        _, best = tl.associative_scan((owner_cb, best), 0, _later_segment)
        question = block // pieces + tl.arange(0, QUESTIONS)
        target = scores + first_score + question[None, :] * document_count + document[:, None]
        written = ends[:, None] & (question < questions)[None, :]
        if (shared == 0) & (pieces == 1):
            tl.store(target, best, mask=written)
        else:
            tl.atomic_max(target, best, mask=written)


@triton.jit
def partial_best(
    scores: tl.tensor, questions: tl.tensor, found: tl.tensor, BLOCK: tl.constexpr, K: tl.constexpr
) -> None:
    """The K best of each block of a question's documents, as keys of `twin.order_keys`.

    questions: int64 (first score, documents). found is left as it is for blocks beyond.
    """
    block, question = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first, documents = tl.load(questions + question * 2), tl.load(questions + question * 2 + 1)
    if block * BLOCK < documents:
        document = block * BLOCK + tl.arange(0, BLOCK)
        inside = document < documents
        value = tl.load(scores + first + document, mask=inside, other=0.0)
        bits = (value + 0.0).to(tl.int32, bitcast=True)  # one zero, not two
        ascending = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
        key = (ascending << 32) | (0xFFFFFFFF - document.to(tl.int64))
        key = tl.where(inside, key, _LOWEST)
        out = found + (question * tl.num_programs(0) + block) * K
        for place in range(K):
            best = tl.max(key, axis=0)
            tl.store(out + place, best)
            key = tl.where(key == best, _LOWEST, key)


@triton.jit
def fetch_rows(
    table: tl.tensor, found: tl.tensor, WIDTH: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    """table: int64 address of every row; found: the rows behind each other."""
    row, value = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(table + row).to(tl.pointer_type(found.dtype.element_ty))
    inside = value < WIDTH
    tl.store(found + row * WIDTH + value, tl.load(source + value, mask=inside), mask=inside)
