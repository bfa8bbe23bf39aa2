"""Checks the stores of a data folder: the tree under them, and every record in them.

Runs beside a live server (as a reader) or without one. The structure of the LMDB
file itself is checked only without a live writer, as it moves under one; it is
checked first, because LMDB trusts its pages and a damaged one can end the process.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import lmdb.verify

from storage.crypto import KeySource, RootKeys, open_keys
from storage.keys import Kind, parse_key
from storage.lmdb_env import DATA_FILE, WRITER_LOCK_FILE
from storage.lmdb_store import LmdbReader
from storage.paths import DataFolder
from storage.records import Buffer
from storage.store import Finding, Problem, StorageError, StoreDamagedError

#: A store with more is not worth listing to the end.
MAX_FINDINGS = 10_000
#: A file of nothing but its first pages, of the largest size LMDB takes.
_FIRST_BYTES = 2 * 65536


@dataclass(frozen=True)
class StoreReport:
    """What a check of one tenant's store found.

    memories, documents, blocks: how many have a record, sound or not. record_bytes:
    of all values. structure_checked: False when a live writer kept the file moving.
    findings: at most MAX_FINDINGS.
    """

    tenant: str
    memories: int
    documents: int
    blocks: int
    record_bytes: int
    structure_checked: bool
    findings: tuple[Finding, ...]

    @property
    def sound(self) -> bool:
        """True when nothing was found."""
        return not self.findings


class _Counts:
    """Counts records on their way to the verifier."""

    def __init__(self) -> None:
        self.memories: set[bytes] = set()
        self.of_kind = dict.fromkeys(Kind, 0)
        self.record_bytes = 0

    def count(self, records: Iterator[tuple[bytes, bytes]]) -> Iterator[tuple[bytes, bytes]]:
        for key, value in records:
            self._add(key, value)
            yield key, value

    def _add(self, key: bytes, value: Buffer) -> None:
        self.record_bytes += len(value)
        try:
            parsed = parse_key(key)
        except ValueError:
            return  # The verifier reports it.
        self.memories.add(parsed.memory)
        self.of_kind[parsed.kind] += 1


def check_store(path: Path, keys: KeySource | None = None) -> StoreReport:
    """Checks one tenant's environment, the folder `path`. keys: of an encrypted store.

    A store that cannot be read at all is a finding, not an exception.
    """
    counts = _Counts()
    structure = check_structure(path)
    # What LMDB might fall over is not given to it.
    findings = structure or _records(path, counts, keys)
    return StoreReport(
        tenant=path.name,
        memories=len(counts.memories),
        documents=counts.of_kind[Kind.DOCUMENT],
        blocks=counts.of_kind[Kind.ROUTING],
        record_bytes=counts.record_bytes,
        structure_checked=structure is not None,
        findings=tuple(findings),
    )


def check_structure(path: Path) -> list[Finding] | None:
    """Checks the pages of one environment's file, without LMDB; None beside a live writer.

    For whoever opens a file that may be damaged: LMDB itself would not notice.
    """
    if not (path / DATA_FILE).exists():
        return []
    with _without_writer(path) as quiet:
        if not quiet:
            return None
        try:
            problems = lmdb.verify.verify(str(path))  # type: ignore[no-untyped-call]  # No types.
        except (lmdb.verify.VerifyError, OSError) as error:
            problems = [str(error)]
    return [Finding("", Problem.DAMAGED, f"file: {text}") for text in problems[:MAX_FINDINGS]]


def require_sound_structure(path: Path) -> None:
    """For whoever opens a file to write: raises StoreDamagedError before LMDB sees it.

    Beside a live writer nothing is looked at: it has done so. A file without a single
    byte set is what a crash leaves of the very first opening; it is removed.
    """
    if _never_committed(path / DATA_FILE):
        (path / DATA_FILE).unlink()
    problems = check_structure(path)
    if problems:
        raise StoreDamagedError(
            f"store {path.name} is damaged in {len(problems)} places, the first: "
            f"{problems[0].detail}"
        )


def _never_committed(file: Path) -> bool:
    if not file.exists() or file.stat().st_size > _FIRST_BYTES:
        return False
    return not any(file.read_bytes())


def check_data_folder(data: DataFolder, root: RootKeys | None = None) -> Iterator[StoreReport]:
    """Checks every tenant's store, in the order of their names. root: of encrypted ones.

    Raises RootKeyError, StorageError (a key file that cannot be read).
    """
    tenants = data.tenant("any").parent
    if tenants.is_dir():
        for path in sorted(tenants.iterdir()):
            if (path / DATA_FILE).exists():
                tenant = path.name
                keys = None
                if root is not None:
                    keys = open_keys(data.keys(tenant), tenant, root)
                yield check_store(path, keys)


@contextmanager
def _without_writer(path: Path) -> Iterator[bool]:
    """Keeps writers away for a while; gives False when one is there already."""
    try:
        lock = os.open(path / WRITER_LOCK_FILE, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        # A writer would have made it: this is a copy that nobody has opened.
        yield True
        return
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(lock)


def _records(path: Path, counts: _Counts, keys: KeySource | None) -> list[Finding]:
    findings: list[Finding] = []
    try:
        reader = LmdbReader(path, keys)
    except StorageError as error:
        return [Finding("", Problem.DAMAGED, str(error))]
    try:
        for finding in reader.check(counts.count):
            findings.append(finding)
            if len(findings) == MAX_FINDINGS:
                break
    except StorageError as error:
        findings.append(Finding("", Problem.DAMAGED, f"the check ended early: {error}"))
    finally:
        reader.close()
    return findings
