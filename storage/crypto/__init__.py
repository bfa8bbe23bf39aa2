"""Keys of what is at rest: a root key, one key per tenant, one per memory, one per document.

    root key      a file, the environment, or a key service      crypto/root_keys.py
      wraps  tenant key       \\
      wraps  memory key       /  the tenant's key file            crypto/key_file.py
      derives  document key      a tree that can lose leaves      crypto/key_tree.py
      encrypts  record           AES-256-GCM                      storage/records.py

docs/format/keys-at-rest.md draws the bytes; docs/adr/0007 says why it is so.
"""

from storage.crypto.key_file import TenantKeys, open_keys
from storage.crypto.key_tree import KeyTree
from storage.crypto.memory_secret import KeySource, MemorySecret
from storage.crypto.root_keys import LocalRootKeys, RootKeyError, RootKeys

__all__ = [
    "KeySource",
    "KeyTree",
    "LocalRootKeys",
    "MemorySecret",
    "RootKeyError",
    "RootKeys",
    "TenantKeys",
    "open_keys",
]
