"""User text in the catalog: display names and labels of memories, and fingerprints of payloads.

The catalog keeps what it is given. Here display name and labels become one sealed text before they
go to it, and again what they were when they come back: JSON, encrypted by AES-256-GCM
under the memory's fields key, which is destroyed with the memory's key. So what a
database keeps of deleted rows cannot be read. A random 96-bit nonce: a memory's fields are
written as often as a person renames it.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import json
import logging
import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import NamedTuple

from cryptography.exceptions import InvalidTag

from memsvc.keys import Keys
from memsvc.v1 import resources_pb2
from storage.catalog import MemoryRow
from storage.crypto import TenantKeys
from storage.store import KeyMissingError, MemoryUid, TenantRemovedError, WrongKeyError

log = logging.getLogger(__name__)

#: Begins every sealed text. No display name holds it: control characters are refused.
_MARK = "\x01"
_NONCE_BYTES = 12
_CONTEXT = b"memsvc memory fields "
_FINGERPRINT = b"memsvc request fingerprint "


class _Text(NamedTuple):
    """A sealed text, and whose it is; uids in hex."""

    tenant: str
    memory: str
    sealed: str

    @property
    def context(self) -> bytes:
        """What the text is bound to."""
        return _CONTEXT + bytes.fromhex(self.tenant) + bytes.fromhex(self.memory)


class Fields:
    """Seals and opens rows. Without encryption everything stays as it is."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys

    async def sealed(self, row: MemoryRow) -> MemoryRow:
        """The row as the catalog keeps it; makes the memory's key when it has none."""
        keys = await self._tenant(row.tenant_uid)
        if keys is None or not (row.display_name or row.labels):
            return row
        return await asyncio.to_thread(_seal, keys, row)

    async def opened(self, row: MemoryRow) -> MemoryRow:
        """The row as users see it. Raises WrongKeyError, KeyMissingError."""
        if not (row.display_name or row.labels):
            return row
        keys = await self._tenant(row.tenant_uid)
        return row if keys is None else await asyncio.to_thread(_open, keys, row)

    async def those_opened(self, rows: Sequence[MemoryRow]) -> Sequence[MemoryRow]:
        """Rows of one tenant, without those whose keys were destroyed since they were read."""
        if not any(row.display_name or row.labels for row in rows):
            return rows
        keys = await self._tenant(rows[0].tenant_uid)
        if keys is None:
            return rows
        return await asyncio.to_thread(_those_open, keys, rows)

    async def opened_reply(
        self, tenant_uid: str, memory: resources_pb2.Memory
    ) -> resources_pb2.Memory:
        """As `opened`, for a memory on its way out; changes it."""
        keys = await self._tenant(tenant_uid)
        if keys is not None and memory.display_name:
            sealed = _Text(tenant_uid, memory.uid, memory.display_name)
            opened = await asyncio.to_thread(_open_text, keys, sealed)
            memory.display_name = opened[0]
            memory.labels.update(opened[1])
        return memory

    async def forget(self, row: MemoryRow) -> None:
        """Destroys the key of a memory that could not be made after all."""
        # With a tenant that was deleted its keys are gone.
        with suppress(TenantRemovedError):
            keys = await self._tenant(row.tenant_uid)
            if keys is not None:
                await asyncio.to_thread(keys.destroy, _uid(row))

    async def fingerprint(self, tenant_uid: str, digest: bytes) -> bytes:
        """A payload's hash made worthless to who would guess short texts: keyed by the tenant."""
        keys = await self._tenant(tenant_uid)
        if keys is None or not digest:
            return digest
        return hmac.digest(keys.tenant_fields(), _FINGERPRINT + digest, hashlib.sha256)

    async def _tenant(self, tenant_uid: str) -> TenantKeys | None:
        """A thread is needed only for keys that are not open yet: that reads their file."""
        return self._keys.known(tenant_uid) or await asyncio.to_thread(
            self._keys.tenant, tenant_uid
        )


def _seal(keys: TenantKeys, row: MemoryRow) -> MemoryRow:
    keys.create(_uid(row))
    plain = json.dumps([row.display_name, dict(row.labels)], ensure_ascii=False).encode()
    nonce = secrets.token_bytes(_NONCE_BYTES)
    context = _Text(row.tenant_uid, row.uid, "").context
    sealed = nonce + keys.fields(_uid(row)).encrypt(nonce, plain, context)
    return replace(row, display_name=_MARK + base64.b64encode(sealed).decode(), labels={})


def _those_open(keys: TenantKeys, rows: Sequence[MemoryRow]) -> list[MemoryRow]:
    found = []
    for row in rows:
        try:
            found.append(_open(keys, row))
        except KeyMissingError:
            log.warning("memory without its key", extra={"memory": row.uid})
    return found


def _open(keys: TenantKeys, row: MemoryRow) -> MemoryRow:
    if not (row.display_name or row.labels):
        return row
    if row.labels:
        raise WrongKeyError(f"memory {row.uid} has plain labels in an encrypted catalog")
    text = _Text(row.tenant_uid, row.uid, row.display_name)
    display_name, labels = _open_text(keys, text)
    return replace(row, display_name=display_name, labels=labels)


def _open_text(keys: TenantKeys, text: _Text) -> tuple[str, dict[str, str]]:
    """Display name and labels. Raises WrongKeyError, KeyMissingError."""
    if not text.sealed.startswith(_MARK):
        raise WrongKeyError(f"memory {text.memory} has plain text in an encrypted catalog")
    cipher = keys.fields(MemoryUid(bytes.fromhex(text.memory)))
    try:
        sealed = base64.b64decode(text.sealed[len(_MARK) :], validate=True)
        plain = cipher.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], text.context)
        display_name, labels = json.loads(plain)
    except (binascii.Error, InvalidTag, ValueError) as error:
        raise WrongKeyError(f"the fields of memory {text.memory} do not open") from error
    return display_name, labels


def _uid(row: MemoryRow) -> MemoryUid:
    return MemoryUid(bytes.fromhex(row.uid))
