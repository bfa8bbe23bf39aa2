"""What a tenant may use, and how calls that want more are refused or slowed down.

    bucket.py    a rate: so many a minute
    pool.py      something there is only so much of, shared fairly by tenants
    quotas.py    one tenant's limits: the server's settings, or its own
    limiter.py   lets calls in, one by one
    turns.py     whose call is worked on next
    refusals.py  refusals come slower the more of them a caller gets
    attempts.py  failed credentials of one address
    streams.py   bounds on the time that streams take

Everything here is used from the event loop's thread alone.
"""

from memsvc.limits.attempts import Attempts
from memsvc.limits.limiter import Admission, Limiter
from memsvc.limits.pool import FairPool
from memsvc.limits.quotas import QUOTAS, Quotas, memories_exceeded
from memsvc.limits.refusals import Refusals
from memsvc.limits.turns import Turns

__all__ = [
    "QUOTAS",
    "Admission",
    "Attempts",
    "FairPool",
    "Limiter",
    "Quotas",
    "Refusals",
    "Turns",
    "memories_exceeded",
]
