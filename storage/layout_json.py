"""A KV layout as JSON, for encoding records and archive manifests, and its fingerprint."""

from __future__ import annotations

import hashlib
from functools import lru_cache

from storage.document_json import DocumentFormatError, Fields, dump_json
from storage.layout import NUMPY_DTYPE, Dtype, KVLayout
from storage.records import FINGERPRINT_BYTES
from storage.store import EncodingId

_MAX = 2**20
_DTYPES: dict[str, Dtype] = {dtype: dtype for dtype in NUMPY_DTYPE}


def layout_fields(layout: KVLayout) -> dict[str, object]:
    """The layout as a JSON object."""
    return {
        "dtype": layout.dtype,
        "head_dim": layout.head_dim,
        "kv_heads": layout.kv_heads,
        "pool_tokens": layout.pool_tokens,
        "routed_layers": list(layout.routed_layers),
        "separate_routing_keys": layout.separate_routing_keys,
    }


def parse_layout(fields: Fields) -> KVLayout:
    """Reads and closes `fields`. Raises DocumentFormatError."""
    name = fields.text("dtype")
    if name not in _DTYPES:
        raise DocumentFormatError(f"layout.dtype is {name[:20]!r}")
    layers = fields.items("routed_layers", _layer)
    if not layers or list(layers) != sorted(set(layers)):
        raise DocumentFormatError("layout.routed_layers does not ascend")
    layout = KVLayout(
        routed_layers=layers,
        kv_heads=fields.integer("kv_heads", 1, _MAX),
        head_dim=fields.integer("head_dim", 1, _MAX),
        pool_tokens=fields.integer("pool_tokens", 1, _MAX),
        dtype=_DTYPES[name],
        separate_routing_keys=fields.flag("separate_routing_keys"),
    )
    fields.close()
    return layout


def _layer(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < _MAX:
        raise DocumentFormatError("layout.routed_layers holds no layer index")
    return value


@lru_cache(maxsize=256)
def fingerprint(encoding: EncodingId, layout: KVLayout) -> bytes:
    """16 bytes in every block record: what model and layout it is for."""
    digest = hashlib.sha256(encoding + dump_json(layout_fields(layout)))
    return digest.digest()[:FINGERPRINT_BYTES]
