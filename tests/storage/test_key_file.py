"""A tenant's key file: what is destroyed is gone from the file, crashes leave one whole key."""

from __future__ import annotations

import os
import random
import resource
from pathlib import Path
from unittest.mock import patch

import pytest

from storage.crypto import LocalRootKeys, RootKeyError, TenantKeys
from storage.crypto.key_slots import HEAD_BYTES, SLOT_BYTES
from storage.crypto.root_keys import new_root_key, parse_root_keys, read_root_keys, write_root_keys
from storage.store import (
    KeyMissingError,
    MemoryUid,
    StorageError,
    StorageFullError,
    StoreNotFoundError,
    StoreUnavailableError,
)
from tests.support.blocks import memory_uid

TENANT = "0a" * 16
ROOT = LocalRootKeys([bytes(range(32))])
#: Of bytes that padding cannot happen to make together with the first of a checksum.
A, B, C = (MemoryUid(bytes([number]) * 16) for number in (1, 2, 3))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys" / f"{TENANT}.keys"


def opened(path: Path, root: LocalRootKeys = ROOT, tenant: str = TENANT) -> TenantKeys:
    return TenantKeys(path, tenant, root, create=True)


def test_keys_outlive_the_process_and_differ(path: Path) -> None:
    keys = opened(path)
    for memory in (A, B):
        keys.create(memory)
        keys.create(memory)
    secrets = {bytes(keys.of(memory).key) for memory in (A, B)}
    assert len(secrets) == 2
    again = opened(path)
    assert again.memories() == [A, B]
    assert {bytes(again.of(memory).key) for memory in (A, B)} == secrets
    assert path.stat().st_mode & 0o777 == 0o600
    data = path.read_bytes()
    assert not any(secret in data for secret in secrets)


def test_a_destroyed_key_leaves_no_byte_of_itself(path: Path) -> None:
    keys = opened(path)
    for memory in (A, B, C):
        keys.create(memory)
    place = HEAD_BYTES + SLOT_BYTES
    was = path.read_bytes()[place : place + SLOT_BYTES]
    assert was.startswith(bytes(B))
    keys.destroy(B)
    keys.destroy(B)
    data = path.read_bytes()
    assert data[place : place + SLOT_BYTES] == bytes(SLOT_BYTES)
    assert data.count(bytes(B)) == 0
    for holder in (keys, opened(path)):
        with pytest.raises(KeyMissingError):
            holder.of(B)
        assert holder.memories() == [A, C]
    keys.create(B)
    assert len(path.read_bytes()) == len(data), "the slot is used again"


def test_a_disk_without_room_or_out_of_order_is_said_so(path: Path) -> None:
    keys = opened(path)
    keys.create(A)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size, limits[1]))
    try:
        with pytest.raises(StorageFullError):
            keys.create(B)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    keys.create(B)
    assert opened(path).memories() == [A, B]
    path.unlink()
    path.mkdir()
    with pytest.raises(StoreUnavailableError):
        keys.create(C)


def test_replacing_destroys_what_was_there(path: Path) -> None:
    keys = opened(path)
    keys.create(A)
    sealed = keys.fields(A).encrypt(bytes(12), b"name", b"")
    before = path.read_bytes()[HEAD_BYTES:]
    for generation in (1, 2, 3):
        keys.replace(A, bytes([generation]) * 32, generation)
        now = path.read_bytes()[HEAD_BYTES:]
        assert before[16:124] not in now, "the earlier wrapped key was overwritten"
        assert [now[:128], now[128:]].count(bytes(128)) == 1
        found = opened(path).of(A)
        assert (bytes(found.key), found.generation) == (bytes([generation]) * 32, generation)
        before = (now[:128].strip(b"\0") and now[:128]) or now[128:]
    assert opened(path).fields(A).decrypt(bytes(12), sealed, b"") == b"name"
    with pytest.raises(KeyMissingError):
        keys.replace(B, bytes(32), 1)


@pytest.mark.parametrize("writes", [1, 2])
def test_a_crash_while_replacing_leaves_the_old_or_the_new(path: Path, writes: int) -> None:
    keys = opened(path)
    keys.create(A)
    old = bytes(keys.of(A).key)
    real, done = os.pwrite, 0

    def stop(handle: int, data: bytes, place: int) -> int:
        nonlocal done
        done += 1
        if done == writes:
            real(handle, data[: 0 if writes == 2 else 60], place)
            raise OSError("power cut")
        return real(handle, data, place)

    with patch("storage.crypto.key_file.os.pwrite", stop), pytest.raises(StorageError):
        keys.replace(A, b"n" * 32, 1)
    found = opened(path).of(A)
    assert bytes(found.key) == (old if writes == 1 else b"n" * 32)
    now = path.read_bytes()[HEAD_BYTES:]
    assert [now[:128], now[128:]].count(bytes(128)) == 1, "opening tidied up"


def test_rotating_the_root_key_touches_the_head_alone(path: Path) -> None:
    keys = opened(path)
    keys.create(A)
    secret = bytes(keys.of(A).key)
    slots, head = path.read_bytes()[HEAD_BYTES:], path.read_bytes()[:HEAD_BYTES]
    both = LocalRootKeys([b"2" * 32, bytes(range(32))])
    opened(path, both).rewrap()
    assert path.read_bytes()[HEAD_BYTES:] == slots
    assert head[:200] not in path.read_bytes()
    assert bytes(opened(path, LocalRootKeys([b"2" * 32])).of(A).key) == secret
    with pytest.raises(RootKeyError):
        opened(path)


def test_renewing_the_tenants_key_keeps_every_memory(path: Path) -> None:
    keys = opened(path)
    for number in range(1, 30):
        keys.create(memory_uid(number))
    keys.destroy(memory_uid(7))
    keys.replace(memory_uid(9), b"9" * 32, 4)
    fields = keys.tenant_fields()
    expected = {m: (bytes(keys.of(m).key), keys.of(m).generation) for m in keys.memories()}
    before = path.read_bytes()
    with path.open("rb") as held:  # The old file, whatever its name.
        keys.renew()
        assert held.read().strip(b"\0") == b""
    for holder in (keys, opened(path)):
        found = {m: (bytes(holder.of(m).key), holder.of(m).generation) for m in expected}
        assert found == expected
        assert holder.tenant_fields() == fields
    now = path.read_bytes()
    wrapped = (before[i : i + 80] for i in range(HEAD_BYTES + 36, len(before) - 80, 256))
    assert not any(key in now for key in wrapped if any(key))


def test_a_tenants_end_leaves_nothing(path: Path) -> None:
    keys = opened(path)
    keys.create(A)
    with path.open("rb") as held:
        keys.destroy_all()
        assert held.read().strip(b"\0") == b""
    assert not path.exists()
    keys.destroy_all()
    with pytest.raises(KeyMissingError):
        keys.of(A)
    with pytest.raises(StoreNotFoundError):
        TenantKeys(path, TENANT, ROOT)


def test_every_bit_flip_is_noticed(path: Path) -> None:
    keys = opened(path)
    keys.create(A)
    secret = bytes(keys.of(A).key)
    whole = path.read_bytes()
    chance = random.Random(5)
    places = [*range(HEAD_BYTES, HEAD_BYTES + 124), *range(160), *chance.sample(range(2048), 40)]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises((StorageError, RootKeyError)):
            assert bytes(opened(path).of(A).key) != secret, "found although it was altered"
    path.write_bytes(whole)
    assert bytes(opened(path).of(A).key) == secret


def test_slots_cannot_change_places_or_tenants(path: Path, tmp_path: Path) -> None:
    keys = opened(path)
    keys.create(A)
    keys.create(B)
    secret = bytes(keys.of(A).key)
    whole = path.read_bytes()
    first = HEAD_BYTES + SLOT_BYTES
    swapped = whole[:HEAD_BYTES] + whole[first:] + whole[HEAD_BYTES:first]
    path.write_bytes(swapped)
    assert bytes(opened(path).of(A).key) == secret, "a place means nothing"
    other = tmp_path / "keys" / "other.keys"
    other.write_bytes(whole)
    with pytest.raises(RootKeyError):
        opened(other, tenant="0b" * 16)


def test_a_root_key_file_is_private_and_strict(tmp_path: Path) -> None:
    path = tmp_path / "root.key"
    with pytest.raises(RootKeyError, match="memsvc init"):
        read_root_keys(path)
    first, second = new_root_key(), new_root_key()
    write_root_keys(path, [first])
    assert path.stat().st_mode & 0o777 == 0o600
    name = read_root_keys(path).current
    with path.open("rb") as held:
        write_root_keys(path, [second, first])
        assert held.read().strip(b"\0") == b"", "the earlier file was overwritten"
    assert read_root_keys(path).current != name
    assert parse_root_keys(f"{first}, {second}").current == name
    path.chmod(0o640)
    with pytest.raises(RootKeyError, match="others"):
        read_root_keys(path)
    for text in ("", "?", "YWJj", "AA=="):
        with pytest.raises(RootKeyError):
            parse_root_keys(text)
