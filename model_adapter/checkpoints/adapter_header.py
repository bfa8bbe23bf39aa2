"""What an adapter file says of itself: its base, layout, training and licence.

docs/format/adapter.md describes the file. The header is the safetensors metadata, a map of
strings; structured entries are JSON objects with exactly the keys named here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from model_adapter.checkpoints.errors import (
    CorruptFileError,
    InvalidConfigError,
    UnsupportedCheckpointError,
)
from model_adapter.checkpoints.values import MAX_JSON_BYTES, Object, parse_object
from model_adapter.msa.config import (
    MAX_LAYERS,
    MAX_POOL_TOKENS,
    MAX_TOP_K,
    MAX_WIDTH,
    LayerChoice,
    QueryReduce,
)

FORMAT = "memsvc-adapter"
FORMAT_VERSION = 1
ARCHITECTURES = ("llama", "qwen3")
#: Fused matrices that can carry a low-rank delta, in the order of a layer's arithmetic.
PARTS = ("qkv", "out", "gate_up", "down")
MAX_RANK = 4096
MAX_TEXT = 65536

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Base:
    """The model that an adapter was trained on. sha256: `adapter.base_hash` of its files."""

    name: str
    sha256: str
    architecture: str


@dataclass(frozen=True)
class AdapterLayout:
    """Shapes, and how scores become a choice.

    routed_layers, delta_layers: ascending. delta_parts: of PARTS; every delta layer has
    all of them, at one rank. heads, kv_heads, head_dim, hidden_size, num_layers: of the base.
    """

    num_layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    routed_layers: tuple[int, ...]
    pool_tokens: int
    query_reduce: QueryReduce
    layer_choice: LayerChoice
    top_k: int
    delta_layers: tuple[int, ...]
    delta_parts: tuple[str, ...]
    rank: int

    def __post_init__(self) -> None:
        """Raises InvalidConfigError."""
        _within("num_layers", self.num_layers, 1, MAX_LAYERS)
        for name in ("hidden_size", "heads", "kv_heads", "head_dim"):
            _within(name, getattr(self, name), 1, MAX_WIDTH)
        _within("pool_tokens", self.pool_tokens, 1, MAX_POOL_TOKENS)
        _within("top_k", self.top_k, 1, MAX_TOP_K)
        for name in ("routed_layers", "delta_layers"):
            layers = getattr(self, name)
            if list(layers) != sorted(set(layers)) or (
                layers and not 0 <= layers[0] <= layers[-1] < self.num_layers
            ):
                raise InvalidConfigError(f"layout.{name}: {layers!r:.80} are not ascending layers")
        if not self.routed_layers:
            raise InvalidConfigError("layout.routed_layers is empty")
        if list(self.delta_parts) != [part for part in PARTS if part in self.delta_parts]:
            raise InvalidConfigError(f"layout.delta_parts is not of {', '.join(PARTS)} in order")
        _within("rank", self.rank, 0, MAX_RANK)
        if bool(self.delta_layers) != bool(self.delta_parts) or bool(self.rank) != bool(
            self.delta_layers
        ):
            raise InvalidConfigError("layout: deltas need layers, parts and a rank, or none")


@dataclass(frozen=True)
class TrainingSource:
    """One set that was trained on. questions and documents: how many were used."""

    name: str
    licence: str
    attribution: str
    questions: int
    documents: int


@dataclass(frozen=True)
class Training:
    """How the weights came about."""

    recipe: str
    seed: int
    steps: int
    tool_version: str
    sources: tuple[TrainingSource, ...]


@dataclass(frozen=True)
class AdapterHeader:
    """The whole header. name: what base and adapter together are called; licence: SPDX."""

    name: str
    licence: str
    base: Base
    layout: AdapterLayout
    training: Training

    @property
    def model_name(self) -> str:
        """What the model is called: never like its base, whose blocks it cannot read."""
        return self.name if self.name != self.base.name else f"{self.name} with memory"

    def metadata(self) -> dict[str, str]:
        """As safetensors keeps it."""
        return {
            "format": FORMAT,
            "format_version": str(FORMAT_VERSION),
            "name": self.name,
            "licence": self.licence,
            "base": _json(asdict(self.base)),
            "layout": _json(asdict(self.layout)),
            "training": _json(asdict(self.training)),
        }

    @classmethod
    def parse(cls, metadata: Mapping[str, str] | None, file: str) -> AdapterHeader:
        """From safetensors metadata.

        Raises UnsupportedCheckpointError for a newer format or an unknown architecture,
        CorruptFileError, InvalidConfigError.
        """
        found = dict(metadata or {})
        if found.get("format") != FORMAT:
            raise UnsupportedCheckpointError(f"{file} is not a {FORMAT} file")
        version = found.get("format_version", "")
        if not re.fullmatch(r"[1-9][0-9]{0,5}", version):
            raise CorruptFileError(f"{file}: format_version is {version!r:.40}")
        if int(version) > FORMAT_VERSION:
            raise UnsupportedCheckpointError(
                f"{file} has format version {version}; this release reads {FORMAT_VERSION}"
            )
        base = _base(_object(found, "base", file))
        return cls(
            name=_text(found, "name", 128),
            licence=_text(found, "licence", 128),
            base=base,
            layout=_layout(_object(found, "layout", file)),
            training=_training(_object(found, "training", file)),
        )


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def _object(found: Mapping[str, str], key: str, file: str) -> Object:
    content = found.get(key, "").encode()
    if len(content) > MAX_JSON_BYTES:
        raise CorruptFileError(f"{file}: {key} is larger than {MAX_JSON_BYTES} bytes")
    return parse_object(content, f"{file}: {key}")


def _base(raw: Object) -> Base:
    base = Base(_text(raw, "name", 128), _text(raw, "sha256", 64), _text(raw, "architecture", 64))
    if not _SHA256.fullmatch(base.sha256):
        raise InvalidConfigError("base.sha256 is not 64 hex digits")
    if base.architecture not in ARCHITECTURES:
        raise UnsupportedCheckpointError(
            f"base.architecture {base.architecture!r:.40} is none of {', '.join(ARCHITECTURES)}"
        )
    return base


def _layout(raw: Object) -> AdapterLayout:
    whole = ("num_layers", "hidden_size", "heads", "kv_heads", "head_dim", "pool_tokens", "top_k")
    numbers = {name: _whole(raw, name) for name in (*whole, "rank")}
    parts = raw.get("delta_parts")
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise InvalidConfigError("layout.delta_parts is not a list of strings")
    try:
        query_reduce = QueryReduce(str(raw.get("query_reduce")))
        layer_choice = LayerChoice(str(raw.get("layer_choice")))
    except ValueError as error:
        raise InvalidConfigError(f"layout: {error}") from error
    return AdapterLayout(
        **numbers,
        routed_layers=_layers(raw, "routed_layers"),
        delta_layers=_layers(raw, "delta_layers"),
        delta_parts=tuple(parts),
        query_reduce=query_reduce,
        layer_choice=layer_choice,
    )


def _training(raw: Object) -> Training:
    sources = raw.get("sources")
    if not isinstance(sources, list) or len(sources) > MAX_TOP_K:
        raise InvalidConfigError("training.sources is not a list, or too long")
    return Training(
        recipe=_text(raw, "recipe", MAX_TEXT),
        seed=_whole(raw, "seed"),
        steps=_whole(raw, "steps"),
        tool_version=_text(raw, "tool_version", 128),
        sources=tuple(_source(item) for item in sources),
    )


def _source(raw: Any) -> TrainingSource:
    if not isinstance(raw, dict):
        raise InvalidConfigError("training.sources holds something else than objects")
    return TrainingSource(
        name=_text(raw, "name", 128),
        licence=_text(raw, "licence", 128),
        attribution=_text(raw, "attribution", MAX_TEXT),
        questions=_whole(raw, "questions"),
        documents=_whole(raw, "documents"),
    )


def _text(raw: Mapping[str, Any], key: str, limit: int) -> str:
    value = raw.get(key)
    if not isinstance(value, str) or not 1 <= len(value) <= limit:
        raise InvalidConfigError(f"{key} is missing, no text, or longer than {limit} characters")
    return value


def _whole(raw: Mapping[str, Any], key: str) -> int:
    value = raw.get(key)
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise InvalidConfigError(f"{key}: {value!r:.40} is not a whole number")
    return value


def _layers(raw: Mapping[str, Any], key: str) -> tuple[int, ...]:
    value = raw.get(key)
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise InvalidConfigError(f"layout.{key} is not a list of whole numbers")
    return tuple(value)


def _within(key: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise InvalidConfigError(f"layout.{key}: {value} is not within {low}..{high}")
