"""The kernels. One program scores one tile of chunks for all questions of its memory.

The keys of a tile are read once from device memory (again from the cache, for every
further block of questions), multiplied with the voting tokens on the matrix units,
reduced over tokens in registers, then over the chunks of each document by a segmented
scan, and one number per document and question is written.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _rows(
    base: tl.tensor, at_row: tl.tensor, dims: tl.tensor, wanted: tl.tensor, WIDTH: tl.constexpr
) -> tl.tensor:
    """[dims, rows] of a question matrix; zeros where they are not wanted."""
    return tl.load(base + at_row[None, :] * WIDTH + dims[:, None], mask=wanted, other=0)


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
    dims, wanted = start + tl.arange(0, GROUP), asked[None, :]
    key = tl.load(keys + at[:, None] * WIDTH + dims[None, :], mask=inside[:, None], other=0)
    total = tl.dot(key, _rows(high, at_row, dims, wanted, WIDTH), total, input_precision="ieee")
    if TWO_PARTS:
        total = tl.dot(key, _rows(low, at_row, dims, wanted, WIDTH), total, input_precision="ieee")
    return total


@triton.jit
def _halves(packed: tl.tensor, ASSEMBLY: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """int8 of the low and of the high 4 bits of each byte, less 8."""
    if ASSEMBLY:
        # Four bytes at a time, which the compiler does not see: setting the top bit of each byte
        # keeps a subtraction within it, and flipping that bit again leaves the signed number.
        lower, upper = tl.inline_asm_elementwise(
            """{
            .reg .b32 high;
            shr.b32 high, $2, 4;
            lop3.b32 $0, $2, 0x0F0F0F0F, 0x80808080, 0xEA;
            lop3.b32 $1, high, 0x0F0F0F0F, 0x80808080, 0xEA;
            sub.u32 $0, $0, 0x08080808;
            sub.u32 $1, $1, 0x08080808;
            xor.b32 $0, $0, 0x80808080;
            xor.b32 $1, $1, 0x80808080;
            }""",
            "=&r,=&r,r",
            [packed],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    else:
        lower, upper = (packed & 15).to(tl.int8) - 8, (packed >> 4).to(tl.int8) - 8
    return lower, upper


@triton.jit
def _integer_group(
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
    FORMAT: tl.constexpr,
    ASSEMBLY: tl.constexpr,
) -> tl.tensor:
    """int32 products of one group: 254 (rows.LOW_UNIT) times those with the high part and those
    with the low one. Exact: keys.MOST_GROUP. A byte of 4-bit keys holds a dimension of the
    group's first half and one of its last."""
    BYTES: tl.constexpr = GROUP * FORMAT // 8
    # Matrix units take no fewer than 32 integers of a row.
    DIMS: tl.constexpr = BYTES if BYTES > 32 else 32
    byte = tl.arange(0, DIMS)
    held, wanted, near = inside[:, None], asked[None, :], start + byte
    if DIMS > BYTES:
        held, wanted = held & (byte < BYTES)[None, :], wanted & (byte < BYTES)[:, None]
    at_byte = at[:, None] * (WIDTH * FORMAT // 8) + start * FORMAT // 8 + byte[None, :]
    key = tl.load(keys + at_byte, mask=held, other=0)
    if FORMAT == 8:
        first = tl.dot(key, _rows(high, at_row, near, wanted, WIDTH), out_dtype=tl.int32)
        rest = tl.dot(key, _rows(low, at_row, near, wanted, WIDTH), out_dtype=tl.int32)
        return first * 254 + rest
    lower, upper = _halves(key, ASSEMBLY)
    far = near + BYTES
    first = tl.dot(lower, _rows(high, at_row, near, wanted, WIDTH), out_dtype=tl.int32)
    first = tl.dot(upper, _rows(high, at_row, far, wanted, WIDTH), first, out_dtype=tl.int32)
    rest = tl.dot(lower, _rows(low, at_row, near, wanted, WIDTH), out_dtype=tl.int32)
    rest = tl.dot(upper, _rows(low, at_row, far, wanted, WIDTH), rest, out_dtype=tl.int32)
    return first * 254 + rest


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
    ASSEMBLY: tl.constexpr,
) -> tl.tensor:
    """fp32 [CHUNKS, ROWS]."""
    total = tl.zeros((CHUNKS, ROWS), dtype=tl.float32)
    for start in range(0, WIDTH, GROUP):
        if FORMAT == 0:
            total = _float_group(
                total, keys, at, inside, high, low, at_row, asked, start, WIDTH, GROUP, TWO_PARTS
            )
        else:
            group = _integer_group(
                keys, at, inside, high, low, at_row, asked, start, WIDTH, GROUP, FORMAT, ASSEMBLY
            )
            at_scale = at * (WIDTH // GROUP) + start // GROUP
            unit = tl.load(scale + at_scale, mask=inside, other=0)
            total += group.to(tl.float32) * unit[:, None]
    if FORMAT != 0:
        total *= tl.load(row_scale + at_row, mask=asked, other=0)[None, :] * (1.0 / 254.0)
    return total


@triton.jit
def _later_segment(
    document: tl.tensor, value: tl.tensor, next_document: tl.tensor, next_value: tl.tensor
) -> tl.tensor:
    """Running maximum that starts anew with each document."""
    same = document == next_document
    return next_document, tl.where(same, tl.maximum(value, next_value), next_value)


@triton.jit(do_not_specialize=("pieces", "first_part"))
def score_tiles(
    high: tl.tensor,
    low: tl.tensor,
    row_scale: tl.tensor,
    row_bias: tl.tensor,
    scores: tl.tensor,
    tiles: tl.tensor,
    parts: tl.tensor,
    values: tl.tensor,
    scales: tl.tensor,
    documents: tl.tensor,
    pieces: tl.tensor,
    first_part: tl.tensor,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNKS: tl.constexpr,
    QUESTIONS: tl.constexpr,
    TOKENS: tl.constexpr,
    FORMAT: tl.constexpr,
    TWO_PARTS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
) -> None:
    """values, scales: int64 addresses of all layers' parts, this layer's from first_part on;
    documents: of each part. FORMAT: bits of integer keys (8, 4), or 0 with `high` in the keys'
    own float type. QUESTIONS: scored at once. pieces: that a question's rows come in, of TOKENS
    each; QUESTIONS is 1 if there are several."""
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

    address = tl.load(values + first_part + part)
    if FORMAT == 0:
        keys = address.to(tl.pointer_type(high.dtype.element_ty))
    elif FORMAT == 8:
        keys = address.to(tl.pointer_type(tl.int8))
    else:
        keys = address.to(tl.pointer_type(tl.uint8))
    # Tensors begin at multiples of 16 bytes, which the compiler can't know of an address.
    keys = tl.multiple_of(keys, 16)
    scale = tl.load(scales + first_part + part).to(tl.pointer_type(tl.float32))
    scale = tl.multiple_of(scale, 16)

    row = tl.arange(0, QUESTIONS * TOKENS)
    for block in range(0, questions * pieces, QUESTIONS):
        asked = row < (questions * pieces - block) * TOKENS
        at_row = (first_question * pieces + block) * TOKENS + row
        total = _products(
            keys, scale, at, inside, high, low, row_scale, at_row, asked,
            CHUNKS, QUESTIONS * TOKENS, WIDTH, GROUP, FORMAT, TWO_PARTS, ASSEMBLY,
        )  # fmt: skip
        total += tl.load(row_bias + at_row, mask=asked, other=0)[None, :]
        # [chunks, QUESTIONS]: over tokens, then over the chunks of a document so far.
        best = tl.max(tl.reshape(total, (CHUNKS, QUESTIONS, TOKENS)), axis=2)
        _, best = tl.associative_scan((owner_cb, best), 0, _later_segment)
        question = block // pieces + tl.arange(0, QUESTIONS)
        target = scores + first_score + question[None, :] * document_count + document[:, None]
        written = ends[:, None] & (question < questions)[None, :]
        if (shared == 0) & (pieces == 1):
            tl.store(target, best, mask=written)
        else:
            tl.atomic_max(target, best, mask=written)
