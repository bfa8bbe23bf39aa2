"""A directory of golden vectors: its files by role, its checkpoints and its documents.

Files say by their names what they hold: bf16 or fp32, exactpool, and `var_NAME` for a
variant whose `msa_config` overrides stand in variants.json, or in the file's own json.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer

from model_adapter.checkpoints import load_directory
from model_adapter.msa.config import LoadedModel, ModelConfig
from model_adapter.msa.encode import TokenisedDocument, batches, encode_batch
from model_adapter.msa.forward import Row, encode_prefix, new_row
from model_adapter.msa.memory import InMemoryView
from model_adapter.msa.model import Decoder
from model_adapter.msa.pool import Cache
from model_adapter.parity.comparison import BF16, EXACT, RUNNING_SUM, Tolerance
from model_adapter.parity.reference_text import document_ids
from storage.layout import KVBlock

_OVERRIDE_KEYS = ("msa_config", "overrides", "config_overrides")


class GoldenError(ValueError):
    """A golden file that cannot be read as one."""


@dataclass(frozen=True)
class Setup:
    """One model over the directory's documents, numbered from 0 as the reference does."""

    config: ModelConfig
    tokenizer: Tokenizer
    eos_ids: frozenset[int]
    decoder: Decoder
    prefix: Cache
    head: tuple[int, ...]
    texts: list[str]
    blocks: list[KVBlock]
    memory: InMemoryView

    def row(self, k: int) -> Row:
        """A question row; positions follow the head's length and k."""
        return new_row(self.decoder, self.prefix, len(self.head) + k)


class Source:
    """A directory of golden files. Setups are made once per checkpoint and override."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        """Raises GoldenError when there are no documents."""
        self.folder = folder
        texts = self.json("docs.json")
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise GoldenError("docs.json: not a list of texts")
        self._texts: list[str] = texts
        variants = self.json("variants.json") if (folder / "variants.json").is_file() else {}
        if not isinstance(variants, dict):
            raise GoldenError("variants.json: not an object")
        self._variants: dict[str, Any] = variants
        self._device = device
        self._setups: dict[str, Setup] = {}

    def json(self, name: str) -> Any:
        """A json file's value. Raises GoldenError."""
        try:
            return json.loads((self.folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise GoldenError(f"{name}: {error}") from error

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """A safetensors file's tensors. Raises GoldenError."""
        try:
            return load_file(self.folder / name)
        except (OSError, SafetensorError) as error:
            raise GoldenError(f"{name}: {error}") from error

    def tolerance(self, stem: str) -> Tolerance:
        """By what the file's name says of dtype and pooling."""
        words = stem.split("_")
        if "bf16" in words:
            return BF16
        return EXACT if "exactpool" in words or stem.startswith("stage1") else RUNNING_SUM

    def setup(self, stem: str, raw: object = None, layers: set[int] | None = None) -> Setup:
        """The model and memory that a golden file is about.

        raw: the file's json, searched for overrides. layers: routed layers it speaks of.
        """
        name = self._variant_name(stem)
        overrides = self._overrides(name, raw)
        checkpoint = self._checkpoint(stem, name)
        key = json.dumps([checkpoint.name, overrides, sorted(layers or ())], sort_keys=True)
        if key not in self._setups:
            self._setups[key] = self._make(checkpoint, overrides, layers)
        return self._setups[key]

    def _variant_name(self, stem: str) -> str:
        found = re.search(r"var_(.+)$", stem)
        if not found:
            return ""
        # A suffix such as _k8 or _exactpool may follow the name; the longest name counts.
        names = [n for n in self._variants if f"{found[1]}_".startswith(f"{n}_")]
        return max(names, key=len, default=found[1])

    def _overrides(self, name: str, raw: object) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        known = self._variants.get(name) if name else None
        if isinstance(known, dict):
            merged.update(known)
        if isinstance(raw, dict):
            for key in _OVERRIDE_KEYS:
                if isinstance(raw.get(key), dict):
                    merged.update(raw[key])
        nested = merged.pop("msa_config", None)
        return {**merged, **nested} if isinstance(nested, dict) else merged

    def _checkpoint(self, stem: str, name: str) -> Path:
        folders = sorted(
            path for path in self.folder.glob("ckpt*") if (path / "config.json").is_file()
        )
        dtype = "bf16" if "bf16" in stem.split("_") else "fp32"
        own = [path for path in folders if name and _plain(name) in _plain(path.name)]
        typed = [path for path in folders if dtype in path.name.split("_")]
        preferred = [path for path in own if path in typed] + own
        preferred += [path for path in folders if path.name == f"ckpt_{dtype}"]
        for path in preferred + typed:
            return path
        raise GoldenError(f"no checkpoint (ckpt_{dtype}) for {stem}")

    def _make(
        self, checkpoint: Path, overrides: Mapping[str, Any], layers: set[int] | None
    ) -> Setup:
        model = load_directory(checkpoint)
        raw = self.json(f"{checkpoint.name}/config.json")
        msa = {**raw.get("msa_config", {}), **overrides}
        config = ModelConfig.parse({**raw, "msa_config": msa})
        if layers and set(config.msa.routed_layers) != layers:
            msa["router_layer_idx"] = ",".join(str(layer) for layer in sorted(layers))
            config = ModelConfig.parse({**raw, "msa_config": msa})
        if config.msa.routed_layers != model.config.msa.routed_layers:
            for path in sorted(checkpoint.glob("*.safetensors")):
                for name, tensor in load_file(path).items():
                    model.weights.setdefault(name, tensor)
        return make_setup(replace(model, config=config), self._texts, self._device)


def make_setup(model: LoadedModel, texts: list[str], device: str = "cpu") -> Setup:
    """Encodes the documents with a model, numbering them from 0."""
    decoder = Decoder(model, torch.device(device))
    documents = [
        TokenisedDocument(number, document_ids(model.tokenizer, number, text))
        for number, text in enumerate(texts)
    ]
    blocks = [block for batch in batches(documents) for block in encode_batch(decoder, batch)]
    blocks.sort(key=lambda block: block.number)
    layout = model.config.layout(model.compute_dtype)
    return Setup(
        config=model.config,
        tokenizer=model.tokenizer,
        eos_ids=frozenset(model.eos_ids),
        decoder=decoder,
        prefix=encode_prefix(decoder, model.template.head),
        head=model.template.head,
        texts=texts,
        blocks=blocks,
        memory=InMemoryView(layout, blocks, dict(enumerate(texts))),
    )


def _plain(name: str) -> str:
    return name.replace("_", "").replace("-", "").lower()
