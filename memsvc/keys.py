"""Keys of what is stored: the root key that a server was given, and its tenants' key files."""

from __future__ import annotations

import asyncio
import threading

from memsvc.config import Config
from storage.crypto import LocalRootKeys, MemorySecret, RootKeyError, TenantKeys
from storage.crypto.key_file import destroy_key_file
from storage.crypto.root_keys import (
    RootKeys,
    new_root_key,
    parse_root_keys,
    read_root_keys,
    write_root_keys,
)
from storage.lmdb_env import DATA_FILE
from storage.paths import DataFolder
from storage.store import MemoryUid, TenantRemovedError


def load_root_keys(config: Config) -> LocalRootKeys | None:
    """The root keys that the settings name; None when encryption is off.

    Raises RootKeyError when there is none, and when the folder is not what the settings say.
    """
    encrypted = config.folder.keys("any").parent.is_dir()
    if not config.encryption:
        if encrypted:
            raise RootKeyError(
                f"{config.data} was set up with encryption; do not turn `encryption` off"
            )
        return None
    if not encrypted:
        raise RootKeyError(
            f"{config.data} was set up without encryption; run it with encryption=false, or "
            "export its memories and import them into a new folder"
        )
    if config.root_key:
        return parse_root_keys(config.root_key)
    return read_root_keys(config.root_key_path)


def make_root_key(config: Config) -> None:
    """Makes what `load_root_keys` needs, unless it is there. Raises RootKeyError."""
    if not config.encryption:
        return
    config.folder.keys("any").parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not config.root_key and not config.root_key_path.exists():
        write_root_keys(config.root_key_path, [new_root_key()])
    load_root_keys(config)


class Keys:
    """Open key files of all tenants. Thread-safe; opening one reads it.

    root: None when nothing is encrypted.
    """

    def __init__(self, folder: DataFolder, root: RootKeys | None) -> None:
        self._folder = folder
        self._root = root
        self._lock = threading.Lock()
        self._open: dict[str, TenantKeys] = {}
        self._destroyed: set[str] = set()

    def tenant(self, tenant_uid: str) -> TenantKeys | None:
        """The tenant's keys, made with the tenant's first use; None without encryption.

        Raises TenantRemovedError when they were destroyed, StoreNotFoundError when data is
        there and its keys are not, RootKeyError, StorageError.
        """
        if self._root is None:
            return None
        with self._lock:
            if tenant_uid in self._destroyed:
                raise TenantRemovedError(f"the keys of tenant {tenant_uid} were destroyed")
            keys = self._open.get(tenant_uid)
            if keys is None:
                # Keys that were lost are not made anew: they would hide the loss.
                new = not (self._folder.tenant(tenant_uid) / DATA_FILE).exists()
                path = self._folder.keys(tenant_uid)
                keys = TenantKeys(path, tenant_uid, self._root, create=new)
                self._open[tenant_uid] = keys
            return keys

    def known(self, tenant_uid: str) -> TenantKeys | None:
        """The tenant's keys where they are open and not destroyed; waits for nothing."""
        return self._open.get(tenant_uid)

    def destroy(self, tenant_uid: str, memory: MemoryUid) -> None:
        """Destroys a memory's key; done twice is no error. Raises as `tenant` does."""
        keys = self.tenant(tenant_uid)
        if keys is not None:
            keys.destroy(memory)

    def destroy_tenant(self, tenant_uid: str) -> None:
        """Destroys every key of a tenant, which gets no others; done twice is no error."""
        with self._lock:
            self._destroyed.add(tenant_uid)
            keys = self._open.pop(tenant_uid, None)
        if keys is not None:
            keys.destroy_all()
        else:
            destroy_key_file(self._folder.keys(tenant_uid))

    async def secret(self, tenant_uid: str, memory: MemoryUid) -> MemorySecret | None:
        """What a worker needs to read a memory; None when it is not encrypted, or has no
        key because nothing was ever written. Raises as `tenant` does.
        """
        if self._root is None:
            return None

        def find() -> MemorySecret | None:
            keys = self.tenant(tenant_uid)
            assert keys is not None
            return keys.find(memory)

        return await asyncio.to_thread(find)


def rotate_root(config: Config) -> int:
    """Makes a new root key, wraps every tenant's key with it, and destroys the earlier ones.

    A crash on the way leaves both, and the call to be repeated. Returns the tenants. Raises
    RootKeyError, StorageError. Blocks; nobody else may hold the data folder.
    """
    if config.root_key:
        raise RootKeyError(
            "root_key is a setting: put the new key before the old one in it and run "
            "`memsvc keys rewrap`"
        )
    path = config.root_key_path
    read_root_keys(path)
    new = new_root_key()
    write_root_keys(path, [new, *path.read_text().split()])
    count = rewrap(config)
    write_root_keys(path, [new])
    return count


def rewrap(config: Config) -> int:
    """Wraps every tenant's key with the root key that is first now. As `rotate_root`."""
    for keys in (found := _all_keys(config)):
        keys.rewrap()
    return len(found)


def renew_tenants(config: Config) -> int:
    """Gives every tenant a new key and wraps its memories' keys with that. As `rotate_root`."""
    for keys in (found := _all_keys(config)):
        keys.renew()
    return len(found)


def _all_keys(config: Config) -> list[TenantKeys]:
    root = load_root_keys(config)
    if root is None:
        raise RootKeyError("nothing is encrypted")
    paths = sorted(config.folder.keys("any").parent.glob("*.keys"))
    return [TenantKeys(path, path.stem, root) for path in paths]
