"""A consistent copy of everything durable, taken beside a running server, and put back.

A backup is a data folder of its own, with the catalog in SQLite whatever database the
server uses, and `backup.json`, which names every file with its hash:

    backup.json  catalog.db  server.key  operator.key  receipts/<tenant>/...
    keys/<tenant>.keys  tenants/<tenant>/data.mdb

It is of one moment. Every tenant's store is opened first. Then, while the catalog's
writers are held off, for some milliseconds, a read transaction is begun in each. All that
the catalog then promises is in the stores: a write puts texts there before it commits, and
a deletion takes them away after. What the stores hold besides, the first start of a
restored server tidies. Then the server's writes go on, and the views are copied.

The root key is not in it: whoever finds a backup cannot read it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import os
import resource
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from memsvc.check import Severity, check_data
from memsvc.config import Config
from memsvc.setup import DataFolderError, hold, make_folders
from storage.catalog import migrate
from storage.catalog.database import sqlite_url
from storage.catalog.snapshot import copy_catalog, put_catalog
from storage.failpoints import Failpoint, reach
from storage.files import sync_folder, write_new
from storage.lmdb_store import LmdbReader
from storage.paths import DataFolder
from storage.store import StoreNotFoundError

FORMAT = 1
MANIFEST = "backup.json"
#: What a backup's files and folders are called. Others would be models, settings or locks.
_HELD = frozenset({"catalog.db", "server.key", "operator.key", "receipts", "keys", "tenants"})
_PIECE_BYTES = 8 * 2**20
#: A tenant's keys change only while a first write or a deletion ends, now that no more begin.
_KEY_TRIES = 500
_KEY_PAUSE_S = 0.01
#: Files that are open besides, and for each tenant's store.
_FILES, _FILES_OF_A_STORE = 128, 2


class BackupError(Exception):
    """The backup cannot be made or is not whole; the message says why."""


@dataclass(frozen=True)
class Outcome:
    """What was copied, and what `check` finds damaged in the copy. file_bytes: of all files.

    began_us: when the backup was begun, UTC microseconds. What was deleted later may be in it.
    """

    path: Path
    files: int
    file_bytes: int
    damage: tuple[str, ...]
    began_us: int


def back_up(config: Config, target: Path) -> Outcome:
    """Writes the backup folder `target`, which must not exist, and verifies it. Blocks.

    Nothing of it is there when this raises: BackupError, CatalogError, StorageError, OSError.
    """
    if target.exists():
        raise BackupError(f"{target} exists already")
    if not config.folder.server_key.exists():
        raise DataFolderError(f"{config.folder.root} is no data folder; run `memsvc init`")
    staged = target.with_name(f".{target.name}.partial")
    shutil.rmtree(staged, ignore_errors=True)
    began_us = time.time_ns() // 1000
    try:
        staged.mkdir(mode=0o700, parents=True)
        _copy(config, DataFolder(staged))
        reach(Failpoint.BACKUP_COPIED)
        damage = _check(config, staged)
        outcome = _seal(staged, target, damage, began_us)
        reach(Failpoint.BACKUP_SEALED)
        staged.rename(target)
        sync_folder(target.parent)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    return outcome


def restore(config: Config, source: Path) -> Outcome:
    """Makes the data folder, and the catalog that the settings name, of a backup. Blocks.

    The folder must not exist or hold nothing but the root key; a catalog of another
    database must be empty. Raises BackupError, DataFolderError, CatalogError, OSError.
    """
    sealed = _verify(source)
    folder = config.folder
    if sealed.encrypted and not (config.root_key or config.root_key_path.exists()):
        raise BackupError(f"it is encrypted: put its root key at {config.root_key_path} first")
    foreign = {path.name for path in folder.root.iterdir()} if folder.root.is_dir() else set()
    if foreign - {folder.root_key.name, folder.lock.name}:
        raise DataFolderError(f"{folder.root} is not empty; restore into a new folder")
    folder.root.mkdir(mode=0o700, parents=True, exist_ok=True)
    with hold(folder):
        make_folders(folder)
        if sealed.encrypted:
            _keys_folder(folder).mkdir(mode=0o700)
        # Without the server key no server starts on what is not whole.
        for name in sorted(sealed.files, key=lambda name: name == folder.server_key.name):
            _copy_file(source / name, folder.root / name)
            reach(Failpoint.RESTORE_COPIED)
        migrate(sqlite_url(folder.catalog.absolute()))
        if config.database_url:
            migrate(config.database_url)
            put_catalog(folder.catalog, config.database_url)
            _remove_sqlite(folder.catalog)
        reach(Failpoint.RESTORE_FILLED)
    damage = _check(config, folder.root)
    sizes = [size for size, _ in sealed.files.values()]
    return Outcome(folder.root, len(sizes), sum(sizes), damage, sealed.began_us)


def begun(source: Path) -> int:
    """When a backup was begun, UTC microseconds, as it says itself. Raises BackupError."""
    return _manifest(source).began_us


def _copy(config: Config, target: DataFolder) -> None:
    """Everything but the manifest."""
    source = config.folder
    if _keys_folder(source).is_dir():
        _keys_folder(target).mkdir(mode=0o700)
    for path in (source.server_key, source.operator_key):
        if path.exists():
            _copy_file(path, target.root / path.name)
    for path in sorted(source.receipts.rglob("*")):
        if path.is_file():
            _copy_file(path, target.root / path.relative_to(source.root))
    with ExitStack() as stack:
        stores = _Stores(stack, source)
        stores.open()
        copies = copy_catalog(
            config.catalog_url, target.catalog.absolute(), lambda: _views(stores, target)
        )
        for copy in copies:
            copy()
    _remove_log(target.catalog)


class _Stores:
    """Every tenant's store, open until the stack ends."""

    def __init__(self, stack: ExitStack, source: DataFolder) -> None:
        self.stack = stack
        self.source = source
        self._readers: dict[str, LmdbReader] = {}

    def open(self) -> dict[str, LmdbReader]:
        """Those that are there now, by tenant. Again opens only what came since.

        Raises BackupError when this process may not have that many files open.
        """
        folder = self.source.tenant("any").parent
        names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        _allow_open_files(_FILES + _FILES_OF_A_STORE * len(names))
        for name in names:
            if name not in self._readers:
                with suppress(StoreNotFoundError):
                    reader = self._readers[name] = LmdbReader(self.source.tenant(name))
                    self.stack.callback(reader.close)
        return {name: self._readers[name] for name in names if name in self._readers}


def _allow_open_files(wanted: int) -> None:
    """Raises this process's own limit where it must and may, else BackupError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise BackupError(
            f"a backup of so many tenants needs {wanted} open files, and {hard} are allowed: "
            "raise the limit (ulimit -Hn)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _views(stores: _Stores, target: DataFolder) -> list[Callable[[], None]]:
    """Begins a view of every tenant's store, with its keys; returns what copies them."""
    return [_view(stores, target, name, reader) for name, reader in stores.open().items()]


def _view(
    stores: _Stores, target: DataFolder, tenant: str, reader: LmdbReader
) -> Callable[[], None]:
    source = stores.source
    for _ in range(_KEY_TRIES):
        keys = _key_bytes(source, tenant)
        with ExitStack() as attempt:
            copy = attempt.enter_context(reader.snapshot())
            if keys == _key_bytes(source, tenant):
                stores.stack.push(attempt.pop_all())
                break
        time.sleep(_KEY_PAUSE_S)
    else:
        raise BackupError(f"the keys of tenant {tenant} change without end")

    def write() -> None:
        copy(target.tenant(tenant))
        if keys is not None:
            write_new(target.keys(tenant), keys)

    return write


def _keys_folder(folder: DataFolder) -> Path:
    """Is there in a folder whose stores are encrypted."""
    return folder.keys("any").parent


def _key_bytes(folder: DataFolder, tenant: str) -> bytes | None:
    path = folder.keys(tenant)
    return path.read_bytes() if path.exists() else None


def _check(config: Config, folder: Path) -> tuple[str, ...]:
    """What is damaged in a folder that holds a backup, or has been restored from one."""
    settings = dataclasses.replace(
        config,
        data=folder,
        database_url=config.database_url if folder == config.data else "",
        root_key_file=str(config.root_key_path),
    )

    async def damage() -> list[str]:
        return [
            f"{finding.tenant} {finding.memory}: {finding.problem}: {finding.detail}"
            async for finding in check_data(settings)
            if finding.severity is Severity.DAMAGE
        ]

    return tuple(asyncio.run(damage()))


def _seal(staged: Path, target: Path, damage: tuple[str, ...], began_us: int) -> Outcome:
    """Writes the manifest over what lies in the folder."""
    _remove_locks(DataFolder(staged))
    files = sorted(path for path in staged.rglob("*") if path.is_file())
    for path in files:
        path.chmod(0o600)
    listed = {
        str(path.relative_to(staged)): {"bytes": path.stat().st_size, "sha256": _hash(path)}
        for path in files
    }
    manifest = {
        "format": FORMAT,
        "began_us": began_us,
        "created_us": time.time_ns() // 1000,
        "encrypted": _keys_folder(DataFolder(staged)).is_dir(),
        "damage": len(damage),
        "files": listed,
    }
    write_new(staged / MANIFEST, json.dumps(manifest, indent=1).encode())
    for folder in {path.parent for path in files} | {staged}:
        sync_folder(folder)
    file_bytes = sum(path.stat().st_size for path in files)
    return Outcome(target, len(files), file_bytes, damage, began_us)


@dataclass(frozen=True)
class _Sealed:
    """What a manifest says. files: size and hash by name. began_us: or the end, where that is
    all an older one says.
    """

    encrypted: bool
    began_us: int
    files: dict[str, tuple[int, str]]


def _manifest(source: Path) -> _Sealed:
    try:
        manifest = json.loads((source / MANIFEST).read_bytes())
        if manifest["format"] != FORMAT:
            raise BackupError(f"{source} is of format {manifest['format']}, not {FORMAT}")
        files = {
            name: (int(entry["bytes"]), str(entry["sha256"]))
            for name, entry in manifest["files"].items()
        }
        began_us = int(manifest.get("began_us", manifest["created_us"]))
    except FileNotFoundError as error:
        raise BackupError(f"{source} is no backup: it has no {MANIFEST}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BackupError(f"{source / MANIFEST} cannot be read") from error
    return _Sealed(bool(manifest.get("encrypted")), began_us, files)


def _verify(source: Path) -> _Sealed:
    """The manifest, once every file was found to be as it says."""
    sealed = _manifest(source)
    for name, (size, digest) in sealed.files.items():
        path = source / name
        if not _is_within(source, name):
            raise BackupError(f"{MANIFEST} names {name}, outside of the backup")
        if not path.is_file() or path.stat().st_size != size or _hash(path) != digest:
            raise BackupError(f"{name} is missing or was altered")
        if PurePosixPath(name).parts[0] not in _HELD:
            raise BackupError(f"{MANIFEST} names {name}, which no backup holds")
    return sealed


def _is_within(folder: Path, name: str) -> bool:
    """Whether a name leads to a file of the folder, and of any other folder to one of that:
    without links and ways up, also those that come back here.
    """
    path = PurePosixPath(name)
    if str(path) != name or path.is_absolute() or not path.name or ".." in path.parts:
        return False
    return not any((folder / part).is_symlink() for part in (path, *path.parents[:-1]))


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _copy_file(source: Path, target: Path) -> None:
    """Durably, with mode 0600."""
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as copy, source.open("rb") as original:
        shutil.copyfileobj(original, copy, _PIECE_BYTES)
        copy.flush()
        os.fsync(copy.fileno())
    sync_folder(target.parent)


def _remove_log(catalog: Path) -> None:
    """What SQLite keeps beside a database; nothing is in it once all connections are closed."""
    for suffix in ("-wal", "-shm"):
        catalog.with_name(catalog.name + suffix).unlink(missing_ok=True)


def _remove_sqlite(catalog: Path) -> None:
    _remove_log(catalog)
    catalog.unlink()


def _remove_locks(folder: DataFolder) -> None:
    """What reading the copy left beside it."""
    _remove_log(folder.catalog)
    for path in folder.tenant("any").parent.glob("*/lock.mdb"):
        path.unlink()
