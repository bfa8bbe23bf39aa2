"""Which engine a model specification names."""

from __future__ import annotations

import torch

from model_adapter.engine import Engine
from model_adapter.fake import FakeEngine, FakeSpec
from storage.paths import DataFolder


class UnusableModelError(Exception):
    """The specification names no model that can be run here."""


def choose_device(name: str) -> torch.device:
    """ "auto" is the first GPU, or else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def load_engine(
    spec: str,
    data: DataFolder,
    device: torch.device,
    dtype: str,
    adapter: str = "auto",
    *,
    routing_keys: str = "auto",
) -> Engine:
    """An engine for "fake", "default" or a path; adapter as in load_engine_source.

    routing_keys: a value of kernel_choice.RoutingKeyChoice. Raises UnusableModelError.
    """
    if spec.partition(":")[0] == "fake":
        try:
            return FakeEngine(FakeSpec.parse(spec))
        except ValueError as error:
            raise UnusableModelError(str(error)) from error
    # ruff: noqa: PLC0415  # imported late: the fake engine starts without them
    from model_adapter.checkpoints import CheckpointError, load_engine_source
    from model_adapter.msa.engine import MsaEngine
    from model_adapter.msa.kernel_choice import RoutingKeyChoice, choose

    try:
        model = load_engine_source(spec, data, dtype, adapter)
        wanted = RoutingKeyChoice(routing_keys)
        routing = choose(wanted, model.config, model.compute_dtype, device)
        return MsaEngine(model, str(device), routing=routing)
    except CheckpointError as error:
        raise UnusableModelError(str(error)) from error
