"""Who calls, and what they may do: what every handler may know of the credential."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass

from storage.catalog import Scope

_RANK = {Scope.READ: 0, Scope.READ_WRITE: 1, Scope.ADMIN: 2}


@dataclass(frozen=True)
class Principal:
    """Who calls, as the credential says. Tenancy comes from here and nowhere else.

    memories: uids of the memories it reaches; None for all of the tenant's.
    ends_us: when the credential ends, in UTC microseconds; None for never.
    """

    tenant_uid: str
    tenant_id: str
    scope: Scope
    operator: bool
    key_id: str
    memories: frozenset[str] | None = None
    ends_us: int | None = None

    def allows(self, scope: Scope) -> bool:
        """Whether this key's scope includes another."""
        return _RANK[self.scope] >= _RANK[scope]


_principal: ContextVar[Principal] = ContextVar("principal")


def current_principal() -> Principal:
    """The caller of the call being served. Raises LookupError outside of one."""
    return _principal.get()


def set_principal(principal: Principal) -> None:
    """For the gate: names the caller for the rest of this call's context."""
    _principal.set(principal)
