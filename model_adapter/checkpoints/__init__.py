"""Loading checkpoints: the published MSA format, plain bases, GGUF files, the default model."""

from __future__ import annotations

from model_adapter.checkpoints.directory import load_directory
from model_adapter.checkpoints.errors import CheckpointError

__all__ = ["CheckpointError", "load_directory"]
