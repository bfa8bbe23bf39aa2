"""The kernel that chooses: the best documents of every question in one launch."""

from __future__ import annotations

import triton
import triton.language as tl

#: Below the key of every document.
_LOWEST = tl.constexpr(-0x8000000000000000)


@triton.jit
def _highest(key: tl.tensor, kept: tl.tensor, K: tl.constexpr) -> tl.tensor:
    """The K highest of both, highest first. No key comes twice, but for the lowest of all."""
    place, found = tl.arange(0, K), tl.full((K,), _LOWEST, tl.int64)
    for rank in range(K):
        highest = tl.maximum(tl.max(key, axis=0), tl.max(kept, axis=0))
        found = tl.where(place == rank, highest, found)
        key = tl.where(key == highest, _LOWEST, key)
        kept = tl.where(kept == highest, _LOWEST, kept)
    return found


@triton.jit
def _best_of_block(
    scores: tl.tensor,
    documents: tl.tensor,
    block: tl.tensor,
    none: tl.tensor,
    BLOCK: tl.constexpr,
    K: tl.constexpr,
) -> tl.tensor:
    """Keys of the K best of BLOCK documents of one question."""
    document = block * BLOCK + tl.arange(0, BLOCK)
    inside = document < documents
    value = tl.load(scores + document, mask=inside, other=0.0)
    bits = (value + 0.0).to(tl.int32, bitcast=True)  # one zero, not two
    ascending = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    key = (ascending << 32) | (0xFFFFFFFF - document.to(tl.int64))
    return _highest(tl.where(inside, key, _LOWEST), none, K)


@triton.jit(do_not_specialize=("wanted",))
def best_documents(
    scores: tl.tensor,
    questions: tl.tensor,
    done: tl.tensor,
    found: tl.tensor,
    best: tl.tensor,
    wanted: tl.tensor,
    BLOCK: tl.constexpr,
    MERGED: tl.constexpr,
    K: tl.constexpr,
) -> None:
    """The best of each question's documents, as keys of `twin.order_keys`: `wanted` of them, K at
    most, into `best`.

    Programs find the best of a block each, and a question's last one to end those of all, MERGED
    keys at a time. MERGED 0: all are left in `found`, [questions, blocks, K]. questions: int64
    (first score, documents). done: programs of each question that ended; zero before and after.
    """
    block, question = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first, documents = tl.load(questions + question * 2), tl.load(questions + question * 2 + 1)
    blocks = tl.maximum(tl.cdiv(documents, BLOCK), 1)
    none, place = tl.full((K,), _LOWEST, tl.int64), tl.arange(0, K)
    base = found + question * tl.num_programs(0) * K
    if block < blocks:
        own = _best_of_block(scores + first, documents, block, none, BLOCK, K)
        if MERGED == 0:
            tl.store(base + block * K + place, own)
        elif blocks == 1:
            tl.store(best + question * wanted + place, own, mask=place < wanted)
        else:
            tl.store(base + block * K + place, own)
            # All threads' keys are written before the one that counts says so.
            tl.debug_barrier()
            if tl.atomic_add(done + question, 1, sem="acq_rel") == blocks - 1:
                kept, item = none, tl.arange(0, MERGED)
                for start in range(0, blocks * K, MERGED):
                    there = start + item < blocks * K
                    others = tl.load(
                        base + start + item, mask=there, other=_LOWEST, cache_modifier=".cg"
                    )
                    kept = _highest(others, kept, K)
                tl.store(best + question * wanted + place, kept, mask=place < wanted)
                tl.store(done + question, 0)
