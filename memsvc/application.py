"""What a running server is made of. Handlers get this one object and nothing else.

    Config, DataFolder     settings and where files lie
    Keys                   what is stored is encrypted with
    Fields                 user text in the catalog, sealed and opened
    Catalog                SQL: what exists
    Stores                 LMDB: texts and blocks, one environment per tenant
    Writes                 the write path: locks, order of commits, idempotency
    Deletions              destroy what was deleted, and sign for it
    Receipts               what this server signs, with its key
    Staging                archives on their way in and out
    Progress               wakes whoever watches or waits for a memory
    EncodingQueue          turns stored documents into blocks in the background
    Workers                clients of the model workers
    Limiter                what each tenant may use
    Leading                which tenants this server leads

`memsvc.server` builds it in this order and closes it in the opposite one.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # Each of these modules takes an Application or parts of it.
    from memsvc.audit import AuditTrail
    from memsvc.auth import Authenticator
    from memsvc.config import Config
    from memsvc.deletion import Deletions
    from memsvc.encoding import EncodingQueue
    from memsvc.fields import Fields
    from memsvc.keys import Keys
    from memsvc.leases import Leading
    from memsvc.limits import Limiter
    from memsvc.paging import PageTokens
    from memsvc.progress import Progress
    from memsvc.receipts import Receipts
    from memsvc.staging import Staging
    from memsvc.stores import Stores
    from memsvc.workers import Workers
    from memsvc.writes import Writes
    from storage.catalog import Catalog
    from storage.paths import DataFolder


@dataclass
class Application:
    """The parts of one server process.

    importing: uids of the memories that a running call fills.
    draining: set when the server stops taking calls. A stream that would
    otherwise run until its client leaves ends with `errors.draining()` then.
    """

    config: Config
    data: DataFolder
    keys: Keys
    fields: Fields
    catalog: Catalog
    stores: Stores
    writes: Writes
    deletions: Deletions
    receipts: Receipts
    staging: Staging
    progress: Progress
    encoding: EncodingQueue
    workers: Workers
    limiter: Limiter
    leases: Leading
    authenticator: Authenticator
    audit: AuditTrail
    page_tokens: PageTokens
    importing: set[str] = field(default_factory=set)
    draining: asyncio.Event = field(default_factory=asyncio.Event)
