"""How many bytes of routing keys a worker holds, and why."""

from __future__ import annotations

import torch

from model_adapter.engine import ModelDescription
from storage.layout import NUMPY_DTYPE

#: Of a CPU worker that is told nothing.
_CPU_BYTES = 2**30
#: Share of a GPU's memory that is free once the model is loaded; the rest is for rows.
_GPU_SHARE = 0.75


def routing_budget(
    model: ModelDescription, device: torch.device, asked: int | None, exact_bytes: int
) -> tuple[int, str]:
    """Bytes on the device, and a sentence for people. asked: None for the worker's choice.

    exact_bytes: of two-stage keys in host RAM, which grow with those on the device: what they
    allow bounds the device's part too.
    """
    if asked is not None:
        budget, why = asked, "as asked"
    elif device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        budget, why = int(free * _GPU_SHARE), f"{_GPU_SHARE:.0%} of the device's free memory"
    else:
        budget, why = _CPU_BYTES, "a CPU worker's default"
    layout, storing = model.layout, model.storing
    if storing is not None and storing.exact:
        item = NUMPY_DTYPE[layout.dtype].itemsize
        coarse = storing.chunk_bytes(layout.width, item)
        bound = exact_bytes * coarse // (layout.width * item)
        if bound < budget:
            budget, why = bound, "what the exact keys' budget in host RAM allows"
    return budget, f"{budget >> 20} MiB of routing keys: {why}"
