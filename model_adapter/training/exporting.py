"""What an adapter file says of the run that it is of."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version

from model_adapter.checkpoints.adapter_header import (
    AdapterHeader,
    AdapterLayout,
    Base,
    Training,
    TrainingSource,
)
from model_adapter.training.settings import Settings


def header_of(
    settings: Settings,
    base: Base,
    layout: AdapterLayout,
    step: int,
    sources: tuple[TrainingSource, ...],
) -> AdapterHeader:
    """The header of an adapter after `step` steps."""
    return AdapterHeader(
        name=settings.name,
        licence=settings.licence,
        base=base,
        layout=layout,
        training=Training(
            recipe=json.dumps(settings.shaping, sort_keys=True, default=str),
            seed=settings.seed,
            steps=step,
            tool_version=_version(),
            sources=sources,
        ),
    )


def _version() -> str:
    try:
        return version("memsvc")
    except PackageNotFoundError:
        return "unknown"
