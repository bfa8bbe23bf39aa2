"""Keys for tests of encrypted stores."""

from __future__ import annotations

from pathlib import Path

from storage.crypto import LocalRootKeys, TenantKeys
from storage.crypto.root_keys import read_root_keys
from storage.lmdb_store import LmdbStore
from storage.paths import DataFolder

ROOT = LocalRootKeys([bytes(range(32))])
TENANT = "0a" * 16


def key_path(folder: Path, tenant: str = TENANT) -> Path:
    """Where tenant_keys keeps them."""
    return folder / f"{tenant}.keys"


def tenant_keys(folder: Path, tenant: str = TENANT) -> TenantKeys:
    """The tenant's keys in a folder; made when they are not there."""
    return TenantKeys(key_path(folder, tenant), tenant, ROOT, create=True)


def keys_in(folder: DataFolder, tenant: str) -> TenantKeys:
    """The keys of a tenant of an initialised data folder that no server holds."""
    return TenantKeys(folder.keys(tenant), tenant, read_root_keys(folder.root_key), create=True)


def open_store(folder: DataFolder, tenant: str) -> LmdbStore:
    """The store of a tenant of an initialised data folder that no server holds."""
    return LmdbStore(folder.tenant(tenant), keys=keys_in(folder, tenant))
