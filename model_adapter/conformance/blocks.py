"""GetInfo and Encode."""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt

from model_adapter.conformance.harness import TEXTS, Harness
from model_adapter.conformance.report import require
from model_adapter.v1 import model_adapter_pb2 as pb
from storage.layout import Bits, KVBlock

_MODEL_ID = re.compile(r"[a-z]([a-z0-9._-]{0,61}[a-z0-9])?")
_IDENTITY = re.compile(r"[0-9a-f]{64}")

NUMBERED = list(enumerate(TEXTS, 1))


async def info(h: Harness) -> None:
    """Says what it is, the same each time, in terms that make sense."""
    own, layout = h.info, h.layout
    require(bool(_MODEL_ID.fullmatch(own.model_id)), f"model_id {own.model_id!r} is no id")
    require(bool(_IDENTITY.fullmatch(own.identity)), f"identity {own.identity!r} is not 64 hex")
    for name in ("max_document_tokens", "max_question_tokens", "max_answer_tokens"):
        require(getattr(own, name) > 0, f"{name} is {getattr(own, name)}")
    for name in ("kv_heads", "head_dim", "pool_tokens"):
        require(getattr(layout, name) > 0, f"layout.{name} is {getattr(layout, name)}")
    layers = layout.routed_layers
    ascending = list(layers) == sorted(set(layers)) and bool(layers) and layers[0] >= 0
    require(ascending, f"layout.routed_layers {list(layers)} are not ascending layer indices")
    require(bool(own.device and own.compute_dtype), "device or compute_dtype is empty")
    again = await h.stub.GetInfo(pb.GetInfoRequest(), timeout=30)
    require(
        (again.model_id, again.identity, again.layout) == (own.model_id, own.identity, own.layout),
        "a second GetInfo says something else",
    )


async def every_document(h: Harness) -> None:
    """Answers every document once, with a block that fits the layout and holds numbers."""
    replies = await h.encode(NUMBERED)
    missing = sorted({number for number, _ in NUMBERED} - replies.keys())
    require(not missing, f"documents {missing} are not answered")
    for reply in replies.values():
        h.block(reply)


async def same_text(h: Harness) -> None:
    """Makes the same block of the same document, alone and in company, now and later."""
    first = {n: h.block(r) for n, r in (await h.encode(NUMBERED)).items()}
    backwards = {n: h.block(r) for n, r in (await h.encode(NUMBERED[::-1])).items()}
    for number, text in NUMBERED:
        require(number in first and number in backwards, f"document {number} is not answered")
        alone = h.block((await h.encode([(number, text)]))[number])
        for other, how in ((backwards[number], "in another order"), (alone, "alone")):
            _require_equal(h, first[number], other, how)


async def another_text(h: Harness) -> None:
    """Makes different blocks of different texts."""
    one, two = [h.block((await h.encode([(1, text)]))[1]) for text in TEXTS[:2]]
    same = one.tokens == two.tokens and all(
        np.array_equal(a, b)
        for a, b in zip(_arrays(one).values(), _arrays(two).values(), strict=True)
    )
    require(not same, "two different texts have the same block")


def _require_equal(h: Harness, one: KVBlock, two: KVBlock, how: str) -> None:
    head = f"document {one.number} encoded {how}"
    require(one.tokens == two.tokens, f"{head} has {two.tokens} tokens, before {one.tokens}")
    others = _arrays(two)
    for name, values in _arrays(one).items():
        a, b = _floats(values), _floats(others[name])
        error = float(np.linalg.norm(a - b) / max(float(np.linalg.norm(a)), 1e-12))
        require(
            error <= h.tolerance,
            f"{head}: {name} differs by {error:.2g} of its length; {h.tolerance:g} is allowed",
        )


def _arrays(block: KVBlock) -> dict[str, Bits]:
    key = {} if block.key_LCE is None else {"key": block.key_LCE}
    return {"routing_key": block.routing_key_LCE, **key, "value": block.value_LCE}


def _floats(values: Bits) -> npt.NDArray[np.float64]:
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return values.astype(np.float64)
