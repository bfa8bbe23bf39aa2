"""Content KV of documents in RAM, within a budget of bytes. No I/O, no locking.

Where a GPU reads it there, it lies in a pool of pinned memory; else each document in memory of its
own. Shape suffixes as in `storage.layout`; W 16-bit words of a row.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch

from model_adapter.content_pool import ContentPool, Place
from model_adapter.tensors import Words, copy_into, tensor_bytes, wipe, words


class Fence(Protocol):
    """What a device was given to do before it, as a CUDA event."""

    def synchronize(self) -> None:
        """Waits until that is done."""


@dataclass(eq=False)
class HeldContent:
    """Content KV of one document in RAM, [L, C, E].

    key_LCE is None when the routing keys are the keys and the table holds them. place: in a pool,
    whose memory a device reads. fence: behind the last that it was asked to read.
    """

    key_LCE: torch.Tensor | None
    value_LCE: torch.Tensor
    place: Place | None = None
    fence: Fence | None = None

    @cached_property
    def key_words(self) -> Words | None:
        """[L, C, W] of the keys, the same memory."""
        return None if self.key_LCE is None else words(self.key_LCE)

    @cached_property
    def value_words(self) -> Words:
        """[L, C, W] of the values, the same memory."""
        return words(self.value_LCE)

    @cached_property
    def addresses(self) -> tuple[int, int]:
        """Of the keys, 0 when there are none, and of the values."""
        key = 0 if self.key_LCE is None else self.key_LCE.data_ptr()
        return key, self.value_LCE.data_ptr()

    @property
    def bytes(self) -> int:
        """Of both tensors."""
        key = 0 if self.key_LCE is None else tensor_bytes(self.key_LCE)
        return key + tensor_bytes(self.value_LCE)

    def copied(self, place: Place) -> HeldContent:
        """The same in a pool's memory, of as many bytes."""
        there, made = place.memory, list[torch.Tensor]()
        for tensor in (self.value_LCE, self.key_LCE):
            if tensor is not None:
                size = tensor_bytes(tensor)
                made.append(there[:size].view(tensor.dtype).view(tensor.shape))
                copy_into(made[-1], tensor)
                there = there[size:]
        return HeldContent(made[1] if len(made) > 1 else None, made[0], place)

    def wipe(self) -> None:
        """Overwrites both with zeros, once nothing reads them."""
        if self.fence is not None:
            self.fence.synchronize()
        if self.key_LCE is not None:
            wipe(self.key_LCE)
        wipe(self.value_LCE)


class ContentCache:
    """Content KV of documents; the least recently used is wiped and dropped first.

    Its user copies what it needs under the lock that it also calls `put` under,
    so that nobody reads a tensor that is being wiped. drops: how often one was dropped.
    """

    def __init__(self, budget_bytes: int, pool: ContentPool | None = None) -> None:
        self.budget_bytes = budget_bytes
        self.bytes = 0
        self.drops = 0
        self._pool = pool
        self._held: OrderedDict[tuple[Hashable, int], HeldContent] = OrderedDict()

    def get(self, memory: Hashable, number: int) -> HeldContent | None:
        """What is held of a document; it is then the most recently used."""
        held = self._held.get((memory, number))
        if held is not None:
            self._held.move_to_end((memory, number))
        return held

    def find(
        self, memory: Hashable, number: int, keys_too: bool, read: Mapping[int, HeldContent]
    ) -> HeldContent | None:
        """What was read of a document, or is held of it; None when keys are wanted and missing."""
        held = read.get(number) or self.get(memory, number)
        return None if held is None or (keys_too and held.key_LCE is None) else held

    def put(self, memory: Hashable, number: int, content: HeldContent) -> bool:
        """Holds it, in a pool a copy of it, if it fits the budget at all, dropping others for it.
        False when the content is still the caller's to wipe: it is not held, or was copied."""
        self._drop((memory, number))
        if content.bytes > self.budget_bytes:
            return False
        while self.bytes + content.bytes > self.budget_bytes:
            self._drop(next(iter(self._held)))
        held = content if self._pool is None else self._copied(content, self._pool)
        if held is not None:
            self._held[memory, number] = held
            self.bytes += held.bytes
        return held is content

    def _copied(self, content: HeldContent, pool: ContentPool) -> HeldContent | None:
        while (place := pool.take(content.bytes)) is None and self._held:
            self._drop(next(iter(self._held)))
        if place is None:
            pool.let_go()
            place = pool.take(content.bytes)
        return None if place is None else content.copied(place)

    def drop_memory(self, memory: Hashable) -> int:
        """Drops all documents of a memory; returns the bytes freed."""
        before = self.bytes
        for key in [key for key in self._held if key[0] is memory]:
            self._drop(key)
        return before - self.bytes

    def _drop(self, key: tuple[Hashable, int]) -> None:
        held = self._held.pop(key, None)
        if held is not None:
            self.drops += 1
            self.bytes -= held.bytes
            held.wipe()
            if held.place is not None and self._pool is not None:
                self._pool.give_back(held.place)

    def __iter__(self) -> Iterator[tuple[Hashable, int]]:
        return iter(self._held)

    def check_integrity(self) -> None:
        """Raises AssertionError when the count of bytes is wrong or over the budget."""
        assert self.bytes == sum(held.bytes for held in self._held.values())
        assert self.bytes <= self.budget_bytes
        if self._pool is not None:
            places = [held.place for held in self._held.values() if held.place is not None]
            assert len(places) == len(self._held)
            self._pool.check_integrity(places)
