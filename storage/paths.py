"""Where things lie in the data folder. All of memsvc's files are under it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class DataFolder:
    """Layout of one data folder. Holds names only; makes nothing by itself."""

    root: Path
    #: A server's own folder, where several share the data folder; None: the root.
    own: Path | None = None

    @property
    def catalog(self) -> Path:
        """SQLite catalog, when no other database is configured."""
        return self.root / "catalog.db"

    @property
    def server_key(self) -> Path:
        """Key that API keys and page tokens are signed with; mode 0600."""
        return self.root / "server.key"

    @property
    def models(self) -> Path:
        """Cache of fetched models."""
        return self.root / "models"

    @property
    def worker_socket(self) -> Path:
        """Unix socket of the supervised worker."""
        return (self.own or self.root) / "worker.sock"

    @property
    def lock(self) -> Path:
        """Held by the one memsvc process that writes here, or shared by the servers that lead
        tenants of one catalog.
        """
        return self.root / "memsvc.lock"

    @property
    def staging(self) -> Path:
        """Imports and exports on their way; emptied at start."""
        return (self.own or self.root) / "staging"

    def server(self, uid: str) -> Path:
        """Folder of one of several servers; with it goes what it left."""
        return self.root / "servers" / uid

    @property
    def root_key(self) -> Path:
        """Root key that wraps every tenant's key; mode 0600. Better kept elsewhere."""
        return self.root / "root.key"

    @property
    def operator_key(self) -> Path:
        """The operator's API key, for commands on this machine; mode 0600."""
        return self.root / "operator.key"

    @property
    def receipts(self) -> Path:
        """Signed receipts of deletions, a folder for each tenant."""
        return self.root / "receipts"

    def keys(self, tenant: str) -> Path:
        """Key file of one tenant; lasts as long as its environment."""
        return self.root / "keys" / f"{tenant}.keys"

    def tenant(self, tenant: str) -> Path:
        """LMDB environment of one tenant."""
        return self.root / "tenants" / tenant
