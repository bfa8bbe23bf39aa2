"""What a device can do at most, measured: a copy's bandwidth and a large matrix product's rate."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of a piece of work on the device, its launches included."""

    device: torch.device
    repeats: int

    def seconds(self, work: Callable[[], object]) -> float:
        """The median of `repeats` runs after two to warm up."""
        for _ in range(2):
            work()
        times = []
        for _ in range(self.repeats):
            self._wait()
            started = time.perf_counter()
            work()
            self._wait()
            times.append(time.perf_counter() - started)
        return statistics.median(times)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def copy_bandwidth(timing: Timing, size: int = 4 << 30) -> float:
    """Bytes a second, read and written, of a plain copy on the device."""
    source = torch.empty(size, dtype=torch.uint8, device=timing.device)
    target = torch.empty_like(source)
    return 2 * size / timing.seconds(lambda: target.copy_(source))


@dataclass(frozen=True)
class Rates:
    """Bytes a second of a copy; operations a second of products of bf16 and of int8."""

    copied: float
    floats: float
    integers: float

    @classmethod
    def of(cls, timing: Timing, size: int = 8192) -> Rates:
        """size: of the square matrices."""
        device = timing.device
        pair = torch.randn(2, size, size, device=device).bfloat16()
        small = torch.randint(-127, 128, (2, size, size), device=device, dtype=torch.int8)
        operations = 2.0 * size**3
        return cls(
            copy_bandwidth(timing, 64 * size * size),
            operations / timing.seconds(lambda: pair[0] @ pair[1]),
            operations / timing.seconds(lambda: torch._int_mm(small[0], small[1].t())),
        )
