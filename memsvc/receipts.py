"""Signed statements of what a deletion destroyed.

A receipt is JSON: the statement, and an Ed25519 signature of the statement's bytes by a key that is
derived from the server's. Who has the public key (`receipts/public.key` of the data folder) can
verify it without the server. It says what the server did; that nothing is left, `memsvc
verify-deletion` looks for. There is no user text in it: numbers, counts and uids.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from storage.document_json import dump_json
from storage.files import sync_folder, write_new
from storage.paths import DataFolder

VERSION = 1
PUBLIC_KEY_FILE = "public.key"
#: Metadata under which a deletion's reply carries its receipt.
METADATA_KEY = "memsvc-receipt-bin"
#: The server's key gives the signing key's seed for this purpose.
SEED_PURPOSE = "deletion receipts"
_SUFFIX = ".json"
_MAX_RUNS = 200


class ReceiptError(Exception):
    """Not a receipt, altered, or signed by another server."""


@dataclass(frozen=True)
class Destroyed:
    """What a deletion destroyed.

    documents: numbers; None for a whole memory or tenant. texts, blocks: records that were
    removed. shared: of the documents, those whose records stay because another memory shows
    them: only this memory's keys to them were destroyed. key: fingerprint of the key that was
    destroyed; empty when there was none, as in a store without encryption. wiped, owed:
    workers that overwrote what they held, and workers that could not be reached and do so
    before they are used again.
    """

    tenant_uid: str
    memory_uid: str = ""
    documents: Sequence[int] | None = None
    texts: int = 0
    blocks: int = 0
    shared: Sequence[int] = ()
    key: str = ""
    wiped: int = 0
    owed: int = 0


@dataclass(frozen=True)
class Kept:
    """A receipt as it lies in the data folder. id: ascending by time within its tenant.

    statement: what it says, read without a look at the signature.
    """

    id: str
    receipt: bytes
    statement: Mapping[str, object]


class Receipts:
    """Signs receipts and keeps them, one file each, in the data folder."""

    def __init__(self, folder: DataFolder, seed: bytes) -> None:
        self._folder = folder.receipts
        self._key = Ed25519PrivateKey.from_private_bytes(seed)

    @property
    def public_key(self) -> str:
        """64 hex digits."""
        return _hex(self._key)

    def sign(self, data: bytes) -> bytes:
        """64 bytes. data: must begin so that it cannot be taken for a receipt's statement."""
        return self._key.sign(data)

    def publish(self) -> None:
        """Writes the public key where it can be fetched."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        (self._folder / PUBLIC_KEY_FILE).write_text(self.public_key + "\n")

    def issue(self, destroyed: Destroyed) -> bytes:
        """The receipt, on disk when this returns. Blocks."""
        statement = dump_json(
            {
                "blocks": destroyed.blocks,
                "documents": _numbers(destroyed.documents),
                "id": secrets.token_hex(16),
                "issued_at_us": time.time_ns() // 1000,
                "key": destroyed.key,
                "memory": destroyed.memory_uid,
                "public_key": self.public_key,
                "shared": _numbers(destroyed.shared),
                "tenant": destroyed.tenant_uid,
                "texts": destroyed.texts,
                "version": VERSION,
                "workers_owed": destroyed.owed,
                "workers_wiped": destroyed.wiped,
            }
        ).decode()
        signature = self._key.sign(statement.encode()).hex()
        receipt = dump_json({"signature": signature, "statement": statement}) + b"\n"
        self._keep(destroyed.tenant_uid, receipt)
        return receipt

    def find(self, tenant_uid: str, receipt_id: str) -> Kept:
        """One of a tenant's receipts. Blocks. Raises FileNotFoundError, ReceiptError."""
        receipt = (self._folder / tenant_uid / f"{receipt_id}{_SUFFIX}").read_bytes()
        return Kept(receipt_id, receipt, _statement(receipt)[1])

    def page(
        self, tenant_uid: str, limit: int, before: str | None = None
    ) -> tuple[list[Kept], str | None]:
        """Some of a tenant's receipts, newest first, and the id that the next page is before.

        Blocks. Raises ReceiptError, OSError.
        """
        ids = receipt_ids(self._folder / tenant_uid)
        older = [one for one in reversed(ids) if before is None or one < before]
        page = [self.find(tenant_uid, one) for one in older[:limit]]
        return page, page[-1].id if len(older) > limit else None

    def _keep(self, tenant_uid: str, receipt: bytes) -> None:
        folder = self._folder / tenant_uid
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        name = f"{time.time_ns() // 1000:016d}-{secrets.token_hex(4)}{_SUFFIX}"
        write_new(folder / name, receipt)
        sync_folder(folder)


def public_key(seed: bytes) -> str:
    """64 hex digits, of the signing key with this seed."""
    return _hex(Ed25519PrivateKey.from_private_bytes(seed))


def _hex(key: Ed25519PrivateKey) -> str:
    return key.public_key().public_bytes_raw().hex()


def _numbers(numbers: Iterable[int] | None) -> str | None:
    """Runs of numbers, "1-3,7"; what has too many runs is counted only."""
    if numbers is None:
        return None
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    if len(runs) > _MAX_RUNS:
        return f"{sum(last - first + 1 for first, last in runs)} documents"
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def verify_receipt(receipt: bytes, public_key: str) -> Mapping[str, object]:
    """The statement. public_key: 64 hex digits, of the server that is trusted.

    Raises ReceiptError.
    """
    signed, found = _statement(receipt)
    try:
        signature = bytes.fromhex(json.loads(receipt)["signature"])
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key.strip()))
        key.verify(signature, signed)
    except InvalidSignature:
        raise ReceiptError(
            "the signature is not of this server, or the receipt was altered"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ReceiptError("not a receipt, or not a public key") from error
    return found


def _statement(receipt: bytes) -> tuple[bytes, Mapping[str, object]]:
    """What is signed, as bytes and read. Raises ReceiptError."""
    try:
        signed = json.loads(receipt)["statement"].encode()
        found = json.loads(signed)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ReceiptError("not a receipt, or not a public key") from error
    if not isinstance(found, dict) or found.get("version") != VERSION:
        raise ReceiptError("a receipt of another version")
    return signed, found


def receipt_ids(folder: Path) -> list[str]:
    """Ids of the receipts in one tenant's folder, oldest first; none without one."""
    try:
        names = [path.name for path in folder.iterdir()]
    except FileNotFoundError:
        return []
    return sorted(name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX))


def receipt_bytes(path: Path) -> bytes:
    """What lies in a file. Raises ReceiptError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ReceiptError(f"cannot be read: {error.strerror}") from error


def read_public_key(path: Path) -> str:
    """Raises ReceiptError."""
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ReceiptError(f"no public key at {path}") from error
