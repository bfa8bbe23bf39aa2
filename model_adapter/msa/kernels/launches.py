"""How the kernels are launched: with which shapes, and with little Python in the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch

from model_adapter.msa.kernels.keys import KeyFormat, RoutingKeys
from model_adapter.msa.kernels.plan import TILE_CHUNKS, Plan
from model_adapter.msa.kernels.rows import MOST_ROWS, Rows

#: Below the key of every document.
LOWEST = -(1 << 63)
#: Of a program's shared memory on a Hopper GPU (227 KiB), some left for reductions.
_SHARED_BYTES = 208 * 1024
#: Rows of several questions that are multiplied at once. Of 16-bit floats many, because every
#: program reads all rows again, and fewer where there are no more. Of integers few enough for
#: three programs beside each other: one multiplies while another turns integers to floats.
_ROWS, _MORE_ROWS, _INTEGER_ROWS = 128, 256, 64
#: From so many rows on a program has 8 warps instead of 4.
_WIDE_ROWS = 64
#: Dimensions of float keys that are multiplied at once, and how many times that are under way.
_STEPS = {_ROWS: 64, _MORE_ROWS: 32}
_STEP, _MOST_STAGES = 128, 4
#: Documents of one program of the choice, and partial choices that are merged at once.
_BLOCK_DOCUMENTS, _MERGED = 4096, 2048
#: Documents that a program of the choice keeps: a power of two, so that few kernels are compiled.
#: Partial choices of more than _MOST_MERGED are sorted; so is everything above MOST_KEPT.
_FEWEST_KEPT, _MOST_MERGED, MOST_KEPT = 16, 32, 256
_BITS = {KeyFormat.FLOAT: 0, KeyFormat.INT8: 8, KeyFormat.INT4: 4}


@dataclass(frozen=True)
class Addresses:
    """Where the keys of all parts lie: int64 on the device. values_LP, scales_LP (anything for
    floats); documents_P: of Spans.document_C."""

    values_LP: torch.Tensor
    scales_LP: torch.Tensor
    documents_P: torch.Tensor

    @classmethod
    def of(
        cls,
        values: Sequence[torch.Tensor],
        scales: Sequence[torch.Tensor],
        documents: Sequence[torch.Tensor],
    ) -> Addresses:
        """values, scales: [L, ...] of each part; documents: [C]. In one transfer."""
        layers, parts = values[0].shape[0], len(documents)
        # Rows of whole 16 bytes: the kernels are compiled for tables that begin so.
        rows = torch.zeros(2 * layers + 1, parts + parts % 2, dtype=torch.int64)
        steps_L1 = torch.arange(layers)[:, None]
        for first, tensors in ((0, values), (layers, scales)):
            bases_P = torch.tensor([item.data_ptr() for item in tensors])
            strides_P = torch.tensor([item.stride(0) * item.element_size() for item in tensors])
            rows[first : first + layers, :parts] = bases_P + steps_L1 * strides_P
        rows[-1, :parts] = torch.tensor([item.data_ptr() for item in documents])
        held = rows.to(documents[0].device)
        return cls(held[:layers], held[layers:-1], held[-1])


@dataclass(frozen=True)
class Way:
    """What a program of score_tiles does at once. group: dimensions; stages: of them under way at
    a time, as many as its shared memory holds."""

    group: int
    warps: int
    stages: int


def way_of(keys: RoutingKeys, rows: int) -> Way:
    """For keys of this kind, and so many rows of questions at once."""
    item, warps = keys.values_CE.element_size(), 8 if rows >= _WIDE_ROWS else 4
    if keys.scale_CS is not None:
        if rows == _INTEGER_ROWS:
            return Way(keys.group, warps=4, stages=3)
        group, row_bytes = keys.group, 2
        key_bytes = keys.values_CE.shape[1] / keys.width
    else:
        group = min(keys.width & -keys.width, _STEPS.get(rows, _STEP))
        key_bytes, row_bytes = float(item), item if _whole(keys) else 2 * item
    stage = group * (TILE_CHUNKS * key_bytes + rows * row_bytes)
    return Way(group, warps, max(1, min(_MOST_STAGES, int(_SHARED_BYTES // stage))))


def questions_at_once(keys: RoutingKeys, tokens: int, most: int) -> int:
    """Of `tokens` rows each, `most` over a memory: few different numbers, for every one is another
    kernel to compile."""
    if most == 1:
        return 1
    if keys.scale_CS is not None:
        return max(1, _INTEGER_ROWS // tokens)
    many = not _whole(keys) and most * tokens > _ROWS
    return (_MORE_ROWS if many else _ROWS) // tokens


def _whole(keys: RoutingKeys) -> bool:
    """A question is multiplied as it is, not in two parts."""
    return keys.values_CE.dtype is torch.float32


class Launch:
    """A kernel with what is the same in all its calls.

    Triton looks at every argument of a call to find what it compiled for such ones, and the driver
    at every tensor, which takes longer than to score a small memory. After the first call both are
    known: the next ones give tensors of the same types, and numbers that nothing was compiled for.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        constants: Mapping[str, int],
        same: tuple[torch.Tensor, ...] = (),
        **options: int,
    ) -> None:
        """same: tensors of all calls, behind those that are new in each."""
        self._first = partial(kernel[grid], **constants, **options)
        self._grid, self._constants = grid, tuple(constants.values())
        self._same = same
        self._addresses = tuple(tensor.data_ptr() for tensor in same)
        self._again: Callable[..., None] | None = None

    def __call__(self, new: tuple[torch.Tensor, ...], *numbers: int) -> None:
        """The kernel's arguments in its order: new tensors, the same ones, numbers, constants."""
        addresses = [tensor.data_ptr() for tensor in new]
        # It was compiled for tensors that begin at multiples of 16 bytes, as torch makes them.
        if self._again is not None and not any(address % 16 for address in addresses):
            self._again(*addresses, *self._addresses, *numbers, *self._constants)
            return
        made = self._first(*new, *self._same, *numbers)
        if made is not None:  # the interpreter compiles nothing
            self._again = made[self._grid]


class Scoring:
    """`score.score` by the kernel, for the layers of one batch and questions of one length.

    first: keys of one part, whose kind all have. tokens: rows of a question.
    """

    def __init__(self, plan: Plan, first: RoutingKeys, addresses: Addresses, tokens: int) -> None:
        from model_adapter.msa.kernels import fused  # noqa: PLC0415  # triton is optional

        at_once = min(tokens, MOST_ROWS)
        self._pieces = tokens // at_once
        self._plan, self._parts = plan, addresses.values_LP.shape[1]
        self._filled = not plan.whole or self._pieces > 1
        tables = (plan.tiles_T4, plan.parts_P4)
        keys = (addresses.values_LP, addresses.scales_LP, addresses.documents_P)
        # Pieces of several questions beside each other would be taken for questions.
        most = max(plan.questions) if self._pieces == 1 else 1
        questions = questions_at_once(first, at_once, most)
        way = way_of(first, questions * at_once)
        constants = {
            "WIDTH": first.width,
            "GROUP": way.group,
            "CHUNKS": TILE_CHUNKS,
            "QUESTIONS": questions,
            "TOKENS": at_once,
            "FORMAT": _BITS[first.format],
            "TWO_PARTS": not _whole(first),
            "ASSEMBLY": plan.tiles_T4.is_cuda,
        }
        grid, options = (plan.tiles_T4.shape[0], 1, 1), {"num_warps": way.warps}
        options["num_stages"] = way.stages
        self._launch = Launch(fused.score_tiles, grid, constants, (*tables, *keys), **options)

    def __call__(self, layer: int, rows: Rows) -> torch.Tensor:
        """Flat fp32 scores, laid out as the plan says. layer: of the addresses."""
        scores = torch.empty(self._plan.size, device=rows.bias_R.device)
        if self._filled:
            scores.fill_(-torch.inf)
        new = (rows.high_RE, rows.low_RE, rows.scale_R, rows.bias_R, scores)
        self._launch(new, self._pieces, layer * self._parts)
        return scores


def best(
    scores: torch.Tensor, questions_B2: torch.Tensor, done_B: torch.Tensor, most: int, k: int
) -> torch.Tensor:
    """int64 [B, k] keys of the best, best first. most: documents of a question; k <= MOST_KEPT."""
    asked, blocks = len(questions_B2), max(1, -(-most // _BLOCK_DOCUMENTS))
    kept = max(_FEWEST_KEPT, 1 << (k - 1).bit_length())
    launch = _choice(scores.get_device(), blocks, asked, kept)
    chosen = done_B.new_empty((asked, k), dtype=torch.int64)
    if kept <= _MOST_MERGED:
        found = chosen if blocks == 1 else chosen.new_empty((asked, blocks, kept))
        launch((scores, questions_B2, done_B, found, chosen), k)
        return chosen
    found = chosen.new_full((asked, blocks, kept), LOWEST)
    launch((scores, questions_B2, done_B, found, chosen), k)
    return found.flatten(1).topk(k, dim=1).values


@lru_cache(maxsize=1024)
def _choice(device: int, blocks: int, asked: int, kept: int) -> Launch:
    """device: what is compiled is loaded there."""
    from model_adapter.msa.kernels import fused_best  # noqa: PLC0415  # triton is optional

    merged = _MERGED if kept <= _MOST_MERGED else 0
    constants = {"BLOCK": _BLOCK_DOCUMENTS, "MERGED": merged, "K": kept}
    return Launch(fused_best.best_documents, (blocks, asked, 1), constants, num_warps=8)
