"""Loading checkpoints: the published MSA format, plain bases, GGUF files, the default model."""

from __future__ import annotations

from pathlib import Path

from model_adapter.checkpoints import default_model
from model_adapter.checkpoints.directory import load_directory
from model_adapter.checkpoints.errors import CheckpointError, CheckpointNotFoundError
from model_adapter.checkpoints.gguf_model import load_gguf
from model_adapter.msa.config import LoadedModel
from storage.paths import DataFolder

__all__ = ["CheckpointError", "load_directory", "load_engine_source", "load_gguf"]


def load_engine_source(spec: str, data: DataFolder, dtype: str = "auto") -> LoadedModel:
    """The model that `spec` names, ready for an engine.

    spec: "default", a directory in the published MSA format or of a Llama-type or Qwen3-type
    base, or a .gguf file. The default model is pulled into the data folder unless it is there.
    dtype: bf16, fp32, or auto (fp32 for fp32 weights, else bf16); it is part of the identity.
    Raises CheckpointError.
    """
    if spec == "default":
        path = default_model.pull(data)
        return load_gguf(path, dtype, default_model.DISPLAY_NAME)
    path = Path(spec)
    if path.is_dir():
        return load_directory(path, dtype)
    if path.is_file() and path.suffix == ".gguf":
        return load_gguf(path, dtype)
    raise CheckpointNotFoundError(
        f"{spec!r:.200} is neither 'default', nor a model directory, nor a .gguf file"
    )
