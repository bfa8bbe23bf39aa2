"""Making a data folder, and holding it: what happens before a server can be built."""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from memsvc import names
from memsvc.audit import OK, audit_key
from memsvc.auth import Authenticator, ServerKey, make_server_key
from memsvc.config import Config
from memsvc.keys import make_root_key
from memsvc.staging import destroy
from storage.catalog import Catalog, NotFoundError, Scope, TenantRow, migrate
from storage.paths import DataFolder

DEFAULT_TENANT = "default"


class DataFolderError(Exception):
    """The data folder is missing, or another server holds it."""


@dataclass(frozen=True)
class Initialised:
    """What `initialise` did. credential: the operator's key, None when one existed already."""

    tenant_id: str
    credential: str | None


def initialise(config: Config) -> Initialised:
    """Makes the data folder, the server key, the root key, the catalog's schema, the tenant
    "default" and the operator's first key. Blocks.

    Done twice it changes nothing and returns no credential. Raises DataFolderError,
    ServerKeyError, RootKeyError, CatalogError.
    """
    folder = config.folder
    folder.root.mkdir(mode=0o700, parents=True, exist_ok=True)
    with hold(folder):
        lost_key = not folder.server_key.exists()
        server_key = make_server_key(folder.server_key)
        make_folders(folder)
        make_root_key(config)
        migrate(config.catalog_url)
        return asyncio.run(_first_key(config, server_key, lost_key=lost_key))


async def _first_key(config: Config, server_key: ServerKey, *, lost_key: bool) -> Initialised:
    """lost_key: keys signed with an earlier server key open nothing any more."""
    catalog = await Catalog.open(config.catalog_url)
    try:
        tenant = await _default_tenant(catalog)
        if not lost_key and await _has_operator(catalog, tenant):
            return Initialised(tenant.tenant_id, None)
        minted = Authenticator(catalog, server_key).mint()
        await catalog.create_api_key(
            minted.key_id,
            tenant.uid,
            "operator",
            Scope.ADMIN,
            operator=True,
            digest=minted.digest,
            expires_us=None,
        )
        await catalog.add_audit(
            audit_key(server_key),
            tenant.uid,
            "memsvc init",
            "CreateApiKey",
            resource=names.api_key_name(tenant.tenant_id, minted.key_id),
            outcome=OK,
        )
        return Initialised(tenant.tenant_id, minted.credential)
    finally:
        await catalog.close()


async def _default_tenant(catalog: Catalog) -> TenantRow:
    try:
        return await catalog.get_tenant(DEFAULT_TENANT)
    except NotFoundError:
        return await catalog.create_tenant(DEFAULT_TENANT, "")


async def _has_operator(catalog: Catalog, tenant: TenantRow) -> bool:
    after = None
    while True:
        keys, after = await catalog.list_api_keys(tenant.uid, 1000, after)
        if any(key.operator and key.revoked_us is None for key in keys):
            return True
        if after is None:
            return False


def make_folders(folder: DataFolder) -> None:
    """Folders below the data folder; staging is emptied of what a crash left."""
    for path in folder.staging.glob("*.msamem"):
        destroy(path)
    shutil.rmtree(folder.staging, ignore_errors=True)
    for path in (folder.staging, folder.tenant("any").parent, folder.models):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)


@contextmanager
def hold(folder: DataFolder, *, shared: bool = False) -> Iterator[None]:
    """Holds the data folder's lock; the kernel frees it when the process ends.

    shared: beside others that hold it so.
    Raises DataFolderError when there is no folder or another process holds it.
    """
    try:
        handle = os.open(folder.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except FileNotFoundError as error:
        raise DataFolderError(f"{folder.root} is no data folder; run `memsvc init`") from error
    try:
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataFolderError(f"another memsvc process holds {folder.root}") from error
        yield
    finally:
        os.close(handle)
