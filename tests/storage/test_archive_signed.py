"""Signatures and histories in archives."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from storage.archive import (
    ArchiveCorruptError,
    ArchivedRevision,
    ArchiveError,
    ArchiveForbiddenError,
    ArchiveSignatureError,
    ArchiveTruncatedError,
    open_archive,
    write_archive,
)
from tests.support.archives import EMPTY, HISTORY, Members, SigningKey, repack, signed, unpack

SIGNATURE = "signature.json"


@pytest.fixture
def at(tmp_path: Path) -> Callable[[bytes], Path]:
    def write(data: bytes) -> Path:
        path = tmp_path / "a"
        path.write_bytes(data)
        return path

    return write


def test_who_signed_is_told_and_can_be_asked_for(at: Callable[[bytes], Path]) -> None:
    mine, other = SigningKey(1), SigningKey(2)
    with open_archive(at(signed(mine))) as archive:
        assert archive.signature is not None
        assert archive.signature.public_key == mine.public_key
        archive.check_signer(mine.public_key.upper())
        with pytest.raises(ArchiveSignatureError, match="another key"):
            archive.check_signer(other.public_key)
    with open_archive(at(signed())) as archive:
        assert archive.signature is None
        with pytest.raises(ArchiveSignatureError, match="not signed"):
            archive.check_signer(mine.public_key)


def attempt(at: Callable[[bytes], Path], members: Members, *, index: bool = True) -> None:
    # An index that is made anew lists no signature.
    listed = [one for one in members if one[0] != SIGNATURE]
    made = unpack(repack(listed)) if index else listed
    made += [one for one in members if one[0] == SIGNATURE]
    open_archive(at(repack(made, index=False))).close()


def test_a_signature_is_of_every_byte(at: Callable[[bytes], Path]) -> None:
    members = unpack(signed(SigningKey(1)))
    attempt(at, members, index=False)
    documents = "documents/000000.jsonl.zst"
    other = dict(unpack(signed(documents=((1, 1), (2, 2)))))
    changed = [(n, other[n] if n in (documents, "manifest.json") else d) for n, d in members]
    with pytest.raises(ArchiveSignatureError, match="not one of this archive"):
        attempt(at, changed)
    theirs = dict(unpack(signed(SigningKey(2))))[SIGNATURE]
    mixed = json.loads(theirs) | {"public_key": SigningKey(1).public_key}
    for text in (json.dumps(mixed).encode(), theirs.replace(b"Ed25519", b"Ed448xx")):
        with pytest.raises(ArchiveSignatureError):
            attempt(at, [(n, text if n == SIGNATURE else d) for n, d in members], index=False)
    for text in (b"", b"{}", b"[]", theirs.replace(b'"', b"'"), theirs[:-9] + b'x"}'):
        with pytest.raises(ArchiveCorruptError):
            attempt(at, [(n, text if n == SIGNATURE else d) for n, d in members], index=False)


def test_a_signature_has_one_place(at: Callable[[bytes], Path]) -> None:
    members = unpack(signed(SigningKey(1)))
    signature = members.pop()
    for wrong in ([signature, *members], [*members[:-1], signature, members[-1]]):
        with pytest.raises(ArchiveError):
            open_archive(at(repack(wrong, index=False)))
    open_archive(at(repack(members, index=False))).close()
    with pytest.raises(ArchiveForbiddenError):
        open_archive(at(repack([*members, signature, signature], index=False)))
    with pytest.raises(ArchiveTruncatedError):
        open_archive(at(repack([*members[:-1], signature], index=False)))


def test_the_history_comes_back(at: Callable[[bytes], Path]) -> None:
    with open_archive(at(signed())) as archive:
        assert list(archive.revisions()) == HISTORY
        assert archive.manifest.revisions == 4
        assert [name for name, _ in unpack(signed())][1] == "revisions/000000.jsonl.zst"


def test_long_histories_take_several_members(at: Callable[[bytes], Path]) -> None:
    long = [ArchivedRevision(n, 10**15 + n, 0, 0, 0) for n in range(1, 60_000)]
    manifest = replace(EMPTY, revision=60_000, revisions=len(long))
    data = b"".join(write_archive(manifest, [], {}, revisions=long))
    assert sum(name.startswith("revisions/") for name, _ in unpack(data)) == 2
    with open_archive(at(data)) as archive:
        assert list(archive.revisions()) == long


@pytest.mark.parametrize(
    "history",
    [
        [HISTORY[1], HISTORY[0]],
        [HISTORY[0], HISTORY[0]],
        [HISTORY[0], replace(HISTORY[1], last_number=0)],
        [*HISTORY, replace(HISTORY[3], revision=EMPTY.revision + 1)],
        [*HISTORY, replace(HISTORY[3], revision=9, last_number=EMPTY.last_number + 1)],
    ],
)
def test_histories_that_cannot_be(
    history: list[ArchivedRevision], at: Callable[[bytes], Path]
) -> None:
    with pytest.raises(ArchiveCorruptError, match="revision"):
        open_archive(at(signed(history=history, documents=())))


@pytest.mark.parametrize("documents", [((1, 2),), ((4, 2),), ((1, 1), (5, 4)), ((6, 5),)])
def test_documents_that_are_not_of_their_revision(
    documents: tuple[tuple[int, int], ...], at: Callable[[bytes], Path]
) -> None:
    with pytest.raises(ArchiveCorruptError, match="another revision"):
        open_archive(at(signed(documents=documents)))


def test_a_history_may_begin_later_than_its_documents(at: Callable[[bytes], Path]) -> None:
    forked = [ArchivedRevision(7, 1_770_000_000_000_000, 3, 0, 5)]
    with open_archive(at(signed(history=forked))) as archive:
        assert [d.revision for d in archive.documents()] == [1, 2, 5]
    with pytest.raises(ArchiveCorruptError):
        open_archive(at(signed(history=forked, documents=((1, 8),))))


def test_counts_and_lines_are_held_to_the_manifest(at: Callable[[bytes], Path]) -> None:
    members = unpack(signed())
    manifest = json.loads(members[0][1])
    for revisions in (3, 5, 0):
        text = json.dumps(manifest | {"revisions": revisions}).encode()
        with pytest.raises(ArchiveError):
            attempt(at, [("manifest.json", text), *members[1:]])
    del manifest["revisions"]
    with pytest.raises(ArchiveForbiddenError):
        attempt(at, [("manifest.json", json.dumps(manifest).encode()), *members[1:]])
