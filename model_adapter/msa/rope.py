"""Rotary positions: half-split rotation, tables in fp32 cast to the model dtype.

Shape suffixes: T tokens, D head dim.
"""

from __future__ import annotations

import torch


class RopeTable:
    """cos and sin of all positions so far; grows by doubling."""

    def __init__(
        self, head_dim: int, theta: float, dtype: torch.dtype, device: torch.device
    ) -> None:
        exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        self._inverse = (1.0 / theta**exponent).to(device)
        self._dtype = dtype
        self._cos_TD = self._sin_TD = torch.empty(0, head_dim, dtype=dtype, device=device)

    def span(self, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [count, D] of consecutive positions."""
        self._grow(first + count)
        return self._cos_TD[first : first + count], self._sin_TD[first : first + count]

    def at(self, positions_T: torch.Tensor, limit: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [T, D] of any positions below `limit`."""
        self._grow(limit)
        return self._cos_TD[positions_T], self._sin_TD[positions_T]

    def reach(self, limit: int) -> None:
        """Makes the table hold all positions below `limit`."""
        self._grow(limit)

    def taken(self, positions_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `at`, of positions that the table holds already; nothing is looked at on the host."""
        return self._cos_TD[positions_T], self._sin_TD[positions_T]

    def tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What `taken` reads now; growing makes others."""
        return self._cos_TD, self._sin_TD

    def _grow(self, size: int) -> None:
        if size <= self._cos_TD.shape[0]:
            return
        size = max(size, 2 * self._cos_TD.shape[0], 2048)
        positions = torch.arange(size, dtype=torch.float32, device=self._inverse.device)
        angles = torch.outer(positions, self._inverse)
        angles_TD = torch.cat((angles, angles), dim=-1)
        self._cos_TD = angles_TD.cos().to(self._dtype)
        self._sin_TD = angles_TD.sin().to(self._dtype)


def rotate(x_THD: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor) -> torch.Tensor:
    """x * cos + rotate_half(x) * sin, for every head."""
    half = x_THD.shape[-1] // 2
    turned_THD = torch.cat((-x_THD[..., half:], x_THD[..., :half]), dim=-1)
    return x_THD * cos_TD[:, None] + turned_THD * sin_TD[:, None]
