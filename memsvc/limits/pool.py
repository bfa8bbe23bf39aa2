"""A bounded pool that no tenant can take all of."""

from __future__ import annotations

from memsvc import errors

_SHARE = 4


class FairPool:
    """bound: units there are. share: a tenant may hold so many times what is still free.

    So a tenant alone gets share / (share + 1) of the pool, two that want everything
    get share / (2 * share + 1) each, and there is always room for one more who comes
    (dynamic thresholds: Choudhury and Hahne, 1998). Nobody has to be configured.
    """

    def __init__(self, bound: int, share: int = _SHARE) -> None:
        self.bound = bound
        self.held = 0
        self._share = share
        self._held: dict[str, int] = {}

    def held_by(self, tenant: str) -> int:
        """Units this tenant holds."""
        return self._held.get(tenant, 0)

    def has_room(self, tenant: str, amount: int = 1) -> bool:
        """Whether `take` would succeed. A tenant that holds nothing may have what is free."""
        free, mine = self.bound - self.held, self.held_by(tenant)
        return amount <= free and (not mine or mine + amount <= self._share * free)

    def require_room(self, tenant: str, amount: int = 1) -> None:
        """Raises OVERLOADED when `take` would."""
        if not self.has_room(tenant, amount):
            raise errors.overloaded()

    def take(self, tenant: str, amount: int = 1) -> None:
        """Raises OVERLOADED; then nothing was taken."""
        self.require_room(tenant, amount)
        self.held += amount
        self._held[tenant] = self.held_by(tenant) + amount

    def give(self, tenant: str, amount: int = 1) -> None:
        """Gives back what was taken."""
        self.held -= amount
        left = self._held[tenant] - amount
        if left:
            self._held[tenant] = left
        else:
            del self._held[tenant]
