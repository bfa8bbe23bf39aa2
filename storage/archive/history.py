"""The revisions of a memory in an archive: what each write made, one JSON line each."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from storage.archive.bounds import MAX_TIME_US, MIN_TIME_US
from storage.archive.errors import ArchiveCorruptError
from storage.document_json import DocumentFormatError, Fields, dump_json, load_json
from storage.keys import MAX_NUMBER


@dataclass(frozen=True)
class ArchivedRevision:
    """What one write made. last_number: the highest document number given out up to then."""

    revision: int
    created_at_us: int
    documents_added: int
    documents_removed: int
    last_number: int


def encode_revision(revision: ArchivedRevision) -> bytes:
    """One line, without its end."""
    return dump_json(asdict(revision))


def decode_revision(line: bytes) -> ArchivedRevision:
    """Raises DocumentFormatError."""
    fields = Fields(load_json(line), "revision")
    found = ArchivedRevision(
        revision=fields.integer("revision", 1, MAX_NUMBER),
        created_at_us=fields.integer("created_at_us", MIN_TIME_US, MAX_TIME_US),
        documents_added=fields.integer("documents_added", 0, MAX_NUMBER),
        documents_removed=fields.integer("documents_removed", 0, MAX_NUMBER),
        last_number=fields.integer("last_number", 0, MAX_NUMBER),
    )
    fields.close()
    return found


class HistoryCheck:
    """Verifies that revisions ascend and that documents are theirs; both come in order.

    A memory as of a revision is its documents up to that revision's last number. An
    archive whose documents do not fit its revisions would show another past.
    """

    def __init__(self, revision: int, last_number: int) -> None:
        self._limits = revision, last_number
        # Revisions that added something: (revision, last_number).
        self._spans: list[tuple[int, int]] = []
        self._next = 0
        self._newest = 0
        self._highest = 0
        self._added = self._removed = 0
        self.revisions = 0

    def take_revision(self, row: ArchivedRevision) -> None:
        """Raises ArchiveCorruptError."""
        if row.revision <= self._newest or row.last_number < self._highest:
            raise ArchiveCorruptError(f"revision {row.revision} is out of order")
        if row.revision > self._limits[0] or row.last_number > self._limits[1]:
            raise ArchiveCorruptError(f"revision {row.revision} is newer than its memory")
        # A document takes a number once and is removed once.
        self._added += row.documents_added
        self._removed += row.documents_removed
        if max(self._added, self._removed) > row.last_number:
            raise ArchiveCorruptError(f"revision {row.revision} counts documents without numbers")
        if row.last_number > self._highest:
            self._spans.append((row.revision, row.last_number))
        self._newest, self._highest = row.revision, row.last_number
        self.revisions += 1

    def take_document(self, number: int, revision: int) -> None:
        """After the last revision. Raises ArchiveCorruptError."""
        if number > self._limits[1] or revision > self._limits[0]:
            raise ArchiveCorruptError(f"document {number} is newer than its memory")
        if not self.revisions:
            return
        while self._next < len(self._spans) and self._spans[self._next][1] < number:
            self._next += 1
        expected = self._spans[self._next][0] if self._next < len(self._spans) else 0
        # A history may begin later than its documents: a fork's does.
        earlier = self._next == 0 and 1 <= revision < expected
        if revision != expected and not earlier:
            raise ArchiveCorruptError(f"document {number} is of another revision")


def decode_line(name: str, line: bytes) -> ArchivedRevision:
    """Raises ArchiveCorruptError naming the member."""
    try:
        return decode_revision(line)
    except DocumentFormatError as error:
        raise ArchiveCorruptError(f"{name}: {error}") from error
