"""The KV cache of one row: per layer its own length, grown geometrically.

Layers differ in length because routed layers also hold the chunks of the documents
that they selected. Order within a layer: template prefix, chunks, the row's tokens.
Shape suffixes are those of model.py.
"""

from __future__ import annotations

from typing import Protocol

import torch

from model_adapter.msa.config import ModelConfig

#: Positions that a layer has room for at first, beyond what it must hold.
HEADROOM = 64


class Held(Protocol):
    """Keys and values of a row, wherever they lie."""

    def read(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """[K, S, D] each."""


class KVCache:
    """Keys and values [K, S, D] of every layer."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        shape = (2, config.num_kv_heads, 0, config.head_dim)
        self._store = [
            torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_layers)
        ]
        self._length = [0] * config.num_layers

    def length(self, layer: int) -> int:
        """Positions held in a layer."""
        return self._length[layer]

    def append(self, layer: int, k_TKD: torch.Tensor, v_TKD: torch.Tensor) -> None:
        """Adds positions at the end; amortised, it copies no more than it adds."""
        first = self._length[layer]
        stop = first + k_TKD.shape[0]
        self._reserve(layer, stop)
        store = self._store[layer]
        store[0, :, first:stop] = k_TKD.transpose(0, 1)
        store[1, :, first:stop] = v_TKD.transpose(0, 1)
        self._length[layer] = stop

    def begin(self, prefix: Held) -> None:
        """Adds a copy of another row to this one."""
        for layer in range(len(self._store)):
            keys_KSD, values_KSD = prefix.read(layer)
            self.append(layer, keys_KSD.transpose(0, 1), values_KSD.transpose(0, 1))

    def read(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [K, S, D] as views, valid until the next append."""
        stop = self._length[layer]
        store = self._store[layer]
        return store[0, :, :stop], store[1, :, :stop]

    def _reserve(self, layer: int, size: int) -> None:
        store = self._store[layer]
        if size <= store.shape[2]:
            return
        capacity = max(size + HEADROOM, store.shape[2] * 3 // 2)
        grown = store.new_empty((*store.shape[:2], capacity, store.shape[3]))
        held = self._length[layer]
        grown[:, :, :held] = store[:, :, :held]
        self._store[layer] = grown
