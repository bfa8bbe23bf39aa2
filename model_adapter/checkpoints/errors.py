"""What can be wrong with a checkpoint: one exception tree, messages for the person who gave it."""

from __future__ import annotations


class CheckpointError(Exception):
    """Root of every refusal to load a checkpoint."""


class CheckpointNotFoundError(CheckpointError):
    """The path, or a file that a checkpoint must have, does not exist."""


class UnsupportedCheckpointError(CheckpointError):
    """A well-formed checkpoint of a kind that is not run here, such as another architecture."""


class InvalidConfigError(CheckpointError):
    """A configuration or metadata value is missing, of the wrong type or out of range."""


class InvalidWeightsError(CheckpointError):
    """A tensor is missing, unexpected, of the wrong shape or type, or holds NaN or infinity."""


class InvalidTokenizerError(CheckpointError):
    """The tokenizer does not parse, or does not fit the model."""


class CorruptFileError(CheckpointError):
    """A file is truncated or its structure contradicts itself."""


class DownloadError(CheckpointError):
    """The default model could not be fetched; the registry may be out of reach."""


class HashMismatchError(CheckpointError):
    """A file is not the one that was pinned, or that an adapter was trained on."""
