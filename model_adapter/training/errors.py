"""What can be wrong before training starts."""

from __future__ import annotations


class TrainingError(Exception):
    """Root of every refusal to train; the message says what to change."""


class SettingsError(TrainingError):
    """A configuration that is incomplete, contradicts itself or names what is not there."""


class DataError(TrainingError):
    """A broken line or row of a data file; the message names file and line."""


class CheckpointMismatchError(TrainingError):
    """A run folder holds a checkpoint of another configuration, or a damaged one."""
