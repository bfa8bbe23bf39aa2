"""Small things that are done with tensors of routing keys and content."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from storage.layout import Bits, KVLayout

#: 16-bit words of a tensor: numpy has no bf16.
Words = npt.NDArray[np.int16]

TORCH_DTYPE = {"bf16": torch.bfloat16, "fp32": torch.float32}


def as_tensor(bits: Bits, layout: KVLayout) -> torch.Tensor:
    """The array's values as a writable tensor, which shares its memory where it can."""
    bits = bits if bits.flags.writeable else bits.copy()
    return torch.from_numpy(bits.view("<i2") if layout.dtype == "bf16" else bits).view(
        TORCH_DTYPE[layout.dtype]
    )


def copy_into(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copies; on a CPU in the calling thread alone.

    torch would copy with a team of OpenMP threads that belongs to the calling thread. With
    more such threads than cores, the OpenMP runtime puts idle ones to sleep at once, the
    engine's too, and the engine loses up to half of its speed.
    """
    if target.device.type == "cpu":
        words(target)[...] = words(source)
    else:
        target.copy_(source)


def wipe(tensor: torch.Tensor) -> None:
    """Overwrites with zeros, as copy_into copies."""
    if tensor.device.type == "cpu":
        words(tensor).fill(0)
    else:
        tensor.zero_()


def words(tensor: torch.Tensor) -> Words:
    """The same memory, of a tensor in RAM; the last dimension counts words."""
    found: Words = tensor.view(torch.int16).numpy()
    return found


def tensor_bytes(tensor: torch.Tensor) -> int:
    """Bytes of the tensor's elements."""
    return tensor.numel() * tensor.element_size()
