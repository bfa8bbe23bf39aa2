"""Content of chosen documents from host RAM to the device.

On a GPU one launch reads the rows where they lie, in pinned memory, and writes them behind
each other: no gathering on the host, no copy of what was gathered.
Shape suffixes are those of this package; R rows that are fetched, X values of a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from model_adapter.msa.kernels.score import fused_available

#: Values of a row that one program moves.
_BLOCK = 512


def fetch(
    parts: Sequence[torch.Tensor], device: torch.device, *, fused: bool | None = None
) -> torch.Tensor:
    """[R, X] on the device: the parts [c, X] behind each other.

    parts: of one type, rows contiguous; in pinned memory when fused, which must stay as it is
    until the device has read it. fused: by the kernel; by default where it runs and the parts
    are pinned.
    """
    if fused is None:
        fused = fused_available(device) and all(part.is_pinned() for part in parts)
    if not fused:
        rows_RX = torch.cat(list(parts))
        if device.type != "cuda":
            return rows_RX
        return rows_RX.pin_memory().to(device, non_blocking=True)
    from model_adapter.msa.kernels import fused as kernels  # noqa: PLC0415  # triton is optional

    width = parts[0].shape[1]
    step = parts[0].stride(0) * parts[0].element_size()
    addresses = [part.data_ptr() + row * step for part in parts for row in range(part.shape[0])]
    table_R = torch.tensor(addresses)
    if device.type == "cuda":
        table_R = table_R.pin_memory().to(device, non_blocking=True)
    found_RX = torch.empty(len(addresses), width, dtype=parts[0].dtype, device=device)
    kernels.fetch_rows[(len(addresses), -(-width // _BLOCK))](
        table_R, found_RX, WIDTH=width, BLOCK=_BLOCK
    )
    return found_RX
