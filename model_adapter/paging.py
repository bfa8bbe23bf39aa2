"""A memory's records as the pager reads them, with the store's errors made the engine's."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from model_adapter.content import HeldContent
from model_adapter.engine import ModelMismatchError
from model_adapter.errors import CorruptRecordError, MemoryChangedError
from model_adapter.readers import Readers
from model_adapter.tensors import as_tensor
from storage import store
from storage.documents import Source, render
from storage.layout import Bits, KVLayout
from storage.store import (
    BlockReader,
    EncodingId,
    MemoryUid,
    RecordNotFoundError,
    Room,
    StoredDocument,
)

#: Documents read first, to learn how large they are, and how much more than the last
#: time are read at most.
_FIRST_DOCUMENTS = 4
_STEP_GROWTH = 16
#: An average of fewer documents predicts nothing.
_SAMPLE_DOCUMENTS = 64
#: Keys are destroyed with what they encrypted.
_KEY_GONE = "a document's key was destroyed while it was being read"


@dataclass(frozen=True, eq=False)
class Slab:
    """Routing keys [L, C, E] of consecutive documents, in RAM.

    expected_chunks: of this slab and all that is left after it, by its own average;
    0 when it is too small to tell.
    """

    numbers: Sequence[int]
    chunks: Sequence[int]
    keys_LCE: torch.Tensor
    expected_chunks: int


class BlockSource:
    """Reads one memory's blocks of one encoding. Holds nothing between calls."""

    def __init__(
        self,
        readers: Readers,
        tenant: str,
        memory: bytes,
        *,
        encoding: EncodingId,
        layout: KVLayout,
        slab_bytes: int,
    ) -> None:
        self._readers = readers
        self._tenant = tenant
        self._memory = MemoryUid(memory)
        self._encoding = encoding
        self._layout = layout
        self._slab_bytes = slab_bytes

    def slabs(
        self,
        first: int,
        last: int,
        lent: Callable[[], AbstractContextManager[Room | None]] = nullcontext,
    ) -> Generator[Slab]:
        """Routing keys of documents first..last, about slab_bytes at a time (one document at
        least). lent: room for each slab, until the next one is asked for; else in new memory.

        Raises CorruptRecordError, ModelMismatchError.
        """
        with self._readers.use(self._tenant) as reader:
            if reader is None or first > last:
                return
            numbers = reader.block_numbers(self._memory, self._encoding, first, last)
            position, step = 0, _FIRST_DOCUMENTS
            while position < len(numbers):
                wanted = numbers[position : position + step]
                left = len(numbers) - position
                with lent() as room:
                    slab = self._load(reader, wanted, left, room)
                    if slab is not None:
                        yield slab
                if slab is not None:
                    per_document = slab.keys_LCE.nbytes / len(slab.numbers)
                    fitting = max(1, int(self._slab_bytes / per_document))
                    step = min(fitting, step * _STEP_GROWTH)
                position += len(wanted)

    def content(self, number: int, routing_too: bool) -> HeldContent:
        """Content KV of one document; with its routing keys if they are the keys and asked for.

        Raises CorruptRecordError, ModelMismatchError, MemoryChangedError.
        """
        with self._readers.use(self._tenant) as reader, self._checked(number, "block"):
            if reader is None:
                raise RecordNotFoundError("no store")
            part = reader.get_content(self._memory, self._encoding, self._layout, number)
            keys_LCE: Bits | None = part.key_LCE
            if keys_LCE is None and routing_too:
                packed = reader.load_routing(
                    self._memory, self._encoding, self._layout, number, number
                )
                if not len(packed.numbers_N):
                    raise RecordNotFoundError("no routing keys")
                keys_LCE = packed.routing_key_LCE
        key_LCE = None if keys_LCE is None else as_tensor(keys_LCE, self._layout)
        return HeldContent(key_LCE, as_tensor(part.value_LCE, self._layout))

    def text(self, number: int) -> str:
        """The rendered source. Raises as document does."""
        return render(self.document(number).source)

    def document(self, number: int) -> StoredDocument:
        """Raises KeyError, CorruptRecordError, MemoryChangedError."""
        with self._readers.use(self._tenant) as reader:
            if reader is None:
                raise KeyError(number)
            try:
                return reader.get_document(self._memory, number)
            except store.KeyMissingError as error:
                raise MemoryChangedError(_KEY_GONE) from error
            except store.CorruptRecordError as error:
                raise _corrupt(number, "text") from error

    def sources(self, numbers: npt.NDArray[np.int64]) -> Iterator[tuple[int, Source]]:
        """(number, source) of these documents, ascending. One whose record fails its checks is
        left out: it is told of when it is to be read for an answer."""
        position, wanted = 0, set(numbers.tolist())
        with self._readers.use(self._tenant) as reader:
            while reader is not None and position < len(numbers):
                first, last = int(numbers[position]), int(numbers[-1])
                try:
                    for document in reader.iter_documents(self._memory, first, last):
                        if document.number in wanted:
                            yield document.number, document.source
                        position = int(np.searchsorted(numbers, document.number, side="right"))
                    return
                except store.CorruptRecordError:
                    yield from self._sound_source(reader, int(numbers[position]))
                    position += 1

    def _sound_source(self, reader: BlockReader, number: int) -> Iterator[tuple[int, Source]]:
        try:
            yield number, reader.get_document(self._memory, number).source
        except (store.CorruptRecordError, RecordNotFoundError):
            return

    @staticmethod
    def check_same(expected: Sequence[int] | npt.NDArray[np.int64], found: Sequence[int]) -> None:
        """Raises MemoryChangedError when the store no longer holds what the index says."""
        if len(expected) != len(found) or any(
            int(a) != b for a, b in zip(expected, found, strict=True)
        ):
            raise MemoryChangedError("documents were removed while they were being read")

    def _load(
        self, reader: BlockReader, numbers: Sequence[int], left: int, room: Room | None
    ) -> Slab | None:
        try:
            packed = reader.load_routing(
                self._memory, self._encoding, self._layout, numbers[0], numbers[-1], room=room
            )
        except store.KeyMissingError as error:
            raise MemoryChangedError(_KEY_GONE) from error
        except store.CorruptRecordError as error:
            raise _corrupt(self._culprit(reader, numbers), "block") from error
        except store.ForeignRecordError as error:
            raise ModelMismatchError("stored blocks are of another model or layout") from error
        found = packed.numbers_N.tolist()
        if not found:
            return None
        chunks = self._layout.chunks_of(packed.tokens_N).tolist()
        keys_LCE = as_tensor(packed.routing_key_LCE, self._layout)
        expected = -(-sum(chunks) * left // len(found)) if len(found) >= _SAMPLE_DOCUMENTS else 0
        return Slab(found, chunks, keys_LCE, expected)

    def _culprit(self, reader: BlockReader, numbers: Sequence[int]) -> int:
        """Which of these documents has the corrupt routing keys."""
        for number in numbers:
            try:
                reader.load_routing(self._memory, self._encoding, self._layout, number, number)
            except store.CorruptRecordError:
                return number
        # Repaired in the meantime: naming the first makes the caller look and ask again.
        return numbers[0]

    @contextmanager
    def _checked(self, number: int, record: str) -> Iterator[None]:
        try:
            yield
        except store.KeyMissingError as error:
            raise MemoryChangedError(_KEY_GONE) from error
        except store.CorruptRecordError as error:
            raise _corrupt(number, record) from error
        except store.ForeignRecordError as error:
            raise ModelMismatchError(
                "a stored block is of another model or layout", number=str(number)
            ) from error
        except RecordNotFoundError as error:
            raise MemoryChangedError("a document was removed while it was being read") from error


def _corrupt(number: int, record: str) -> CorruptRecordError:
    return CorruptRecordError(
        f"the stored {record} of document {number} fails its checks",
        number=str(number),
        record=record,
    )
