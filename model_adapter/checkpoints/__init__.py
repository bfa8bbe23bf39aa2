"""Loading checkpoints: the published MSA format, plain bases, GGUF files, the default model,
and adapters on any of the bases."""

from __future__ import annotations

import re
from pathlib import Path

from model_adapter.checkpoints import default_model
from model_adapter.checkpoints.adapter import Adapter, read_adapter, write_adapter
from model_adapter.checkpoints.adapter_header import AdapterHeader
from model_adapter.checkpoints.directory import load_directory
from model_adapter.checkpoints.errors import CheckpointError, CheckpointNotFoundError
from model_adapter.checkpoints.gguf_model import load_gguf
from model_adapter.msa.config import MAX_POOL_TOKENS, LoadedModel
from storage.paths import DataFolder

__all__ = [
    "Adapter",
    "AdapterHeader",
    "CheckpointError",
    "load_directory",
    "load_engine_source",
    "load_gguf",
    "read_adapter",
    "write_adapter",
]

#: The adapter that comes with a release and goes on the default model, when there is one.
SHIPPED_ADAPTER = Path(__file__).parents[1] / "adapters" / "default.safetensors"


def load_engine_source(
    spec: str, data: DataFolder, dtype: str = "auto", adapter: str = "auto"
) -> LoadedModel:
    """The model that `spec` names, ready for an engine.

    spec: "default" (or "default:pool_tokens=N" for another pooling size, which is another
    model), a directory in the published MSA format or of a Llama-type or Qwen3-type
    base, or a .gguf file. The default model is pulled into the data folder unless it is there.
    dtype: bf16, fp32, or auto (fp32 for fp32 weights, else bf16); it is part of the identity.
    adapter: the path of an adapter file, "none", or "auto": the shipped one for the default
    model, none for others. Raises CheckpointError.
    """
    name, colon, options = spec.partition(":")
    if name == "default":
        pool_tokens = _pool_tokens(options) if colon else 0
        opened = _adapter(spec, adapter)
        path = default_model.pull(data)
        return load_gguf(path, dtype, default_model.DISPLAY_NAME, opened, pool_tokens)
    opened = _adapter(spec, adapter)
    path = Path(spec)
    if path.is_dir():
        return load_directory(path, dtype, opened)
    if path.is_file() and path.suffix == ".gguf":
        return load_gguf(path, dtype, adapter=opened)
    raise CheckpointNotFoundError(
        f"{spec!r:.200} is neither 'default', nor a model directory, nor a .gguf file"
    )


def _pool_tokens(options: str) -> int:
    match = re.fullmatch(r"pool_tokens=([1-9][0-9]{0,3})", options)
    if match is None or int(match[1]) > MAX_POOL_TOKENS:
        raise CheckpointNotFoundError(
            f"'default:{options:.100}': all it takes is pool_tokens=N, 1 to {MAX_POOL_TOKENS}"
        )
    return int(match[1])


def _adapter(spec: str, adapter: str) -> Adapter | None:
    if adapter == "none" or (adapter == "auto" and spec != "default"):
        return None
    if adapter != "auto":
        return read_adapter(Path(adapter))
    return read_adapter(SHIPPED_ADAPTER) if SHIPPED_ADAPTER.is_file() else None
