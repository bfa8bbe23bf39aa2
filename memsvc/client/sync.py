"""The blocking client, made from the asyncio one. Its signatures stand in sync.pyi."""

from __future__ import annotations

from memsvc.client.admin import AsyncAdmin
from memsvc.client.aio import AsyncClient
from memsvc.client.bridge import blocking
from memsvc.client.documents import AsyncDocuments
from memsvc.client.handle import AsyncMemoryHandle
from memsvc.client.memories import AsyncMemories
from memsvc.client.models import AsyncModels

Documents = blocking(AsyncDocuments, "Documents")
MemoryHandle = blocking(AsyncMemoryHandle, "MemoryHandle")
Memories = blocking(AsyncMemories, "Memories")
Models = blocking(AsyncModels, "Models")
Admin = blocking(AsyncAdmin, "Admin")
Client = blocking(AsyncClient, "Client", root=True)
