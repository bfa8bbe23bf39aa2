"""What is asked of a memory's documents beside routing: their words, and what filters look at."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
import numpy.typing as npt

from model_adapter.attributes import AttributeIndex, Numbers
from model_adapter.errors import UnwantedError
from model_adapter.indexes import Indexes, batches
from model_adapter.lexical import LexicalIndex
from model_adapter.paging import BlockSource
from model_adapter.residency import HeldMemory, Index, MemoryKey
from storage.documents import Source, render
from storage.filters import DocumentFilter


class Derived:
    """Indexes of the memories that a pager holds. Thread-safe.

    source: a memory's records. The budgets are bytes.
    """

    def __init__(
        self,
        source: Callable[[MemoryKey], BlockSource],
        lexical_budget: int,
        attribute_budget: int,
    ) -> None:
        self._source = source
        self._words = Indexes(LexicalIndex, lexical_budget)
        self._attributes = Indexes(AttributeIndex, attribute_budget)

    @property
    def lexical_bytes(self) -> int:
        """Of all full-text indexes now."""
        return self._words.bytes

    @property
    def attribute_bytes(self) -> int:
        """Of what filters look at, now."""
        return self._attributes.bytes

    def words(
        self,
        memory: HeldMemory,
        index: Index,
        question: str,
        limit: int,
        *,
        unwanted: Callable[[], bool],
        among: Numbers | None,
    ) -> dict[int, float] | None:
        """See Lease.words. index: of the lease."""

        def texts(first: int) -> Iterable[tuple[int, str]]:
            return ((n, render(source)) for n, source in self._documents(memory, index, first))

        def ask(words: LexicalIndex) -> dict[int, float]:
            is_past = words.last_number > index.last_number
            counted = index.numbers_N if among is None and is_past else among
            return words.search(question, limit, counted)

        check_wanted = partial(_check_wanted, unwanted)
        return self._words.ask(memory, ask, documents=texts, check_wanted=check_wanted)

    def matching(
        self,
        memory: HeldMemory,
        index: Index,
        wanted: DocumentFilter,
        unwanted: Callable[[], bool],
    ) -> npt.NDArray[np.bool_]:
        """See Lease.matching. A memory whose attributes find no room is read through."""
        documents = partial(self._documents, memory, index)
        check_wanted = partial(_check_wanted, unwanted)
        numbers = self._attributes.ask(
            memory,
            lambda attributes: attributes.matching(wanted),
            documents=documents,
            check_wanted=check_wanted,
        )
        if numbers is None:
            numbers = _read_through(documents(0), wanted, check_wanted)
        return np.isin(index.numbers_N, numbers, assume_unique=True)

    def drop(self, memory: HeldMemory) -> None:
        """Wipes what there is of a memory. Nobody may be asking it, nor come to."""
        self._words.drop(memory)
        self._attributes.drop(memory)

    def check_integrity(self) -> None:
        """Raises AssertionError when a count of bytes is wrong or over its budget."""
        self._words.check_integrity()
        self._attributes.check_integrity()

    def _documents(
        self, memory: HeldMemory, index: Index, first: int
    ) -> Iterable[tuple[int, Source]]:
        """(number, source) of a lease's documents from a number on."""
        numbers_N = index.numbers_N
        return self._source(memory.key).sources(numbers_N[np.searchsorted(numbers_N, first) :])


def _check_wanted(unwanted: Callable[[], bool]) -> None:
    if unwanted():
        raise UnwantedError("the caller went away while the memory's documents were indexed")


def _read_through(
    documents: Iterable[tuple[int, Source]],
    wanted: DocumentFilter,
    check_wanted: Callable[[], None],
) -> Numbers:
    """Numbers of those that match, holding the attributes of some hundred at a time."""
    found = [np.zeros(0, np.int64)]
    for batch in batches(documents):
        check_wanted()
        some = AttributeIndex()
        some.add(batch)
        found.append(some.matching(wanted))
        some.wipe()
    return np.concatenate(found)
