"""What a check found."""

from __future__ import annotations

from dataclasses import dataclass


class ContractError(Exception):
    """The worker broke its contract; the message says where, in one line."""


class SkippedError(Exception):
    """The check cannot be made here; the message says why."""


@dataclass(frozen=True)
class Result:
    """One check. outcome: "passed", "failed" or "skipped"; detail is empty when it passed."""

    name: str
    outcome: str
    detail: str
    seconds: float

    @property
    def line(self) -> str:
        """For people."""
        head = f"{self.outcome:8}{self.name}"
        return f"{head}: {self.detail}" if self.detail else head


def require(held: bool, problem: str) -> None:
    """Raises ContractError with the problem unless it held."""
    if not held:
        raise ContractError(problem)
