"""Whose turn it is: questions wait in one line per tenant. The scheduler guards it.

The tenant with the fewest questions running goes first, among several the one that
was served longest ago; within a tenant, whoever came first. And no tenant can hold
every place: it may have as much as SHARE times what is still free.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import count
from typing import Any

from model_adapter.jobs import Job, QueryJob, RouteJob

SHARE = 4


def has_room(places: int, held: int, mine: int) -> bool:
    """Whether a tenant that has `mine` of the `held` places may take one more."""
    free = places - held
    return free > 0 and (not mine or mine < SHARE * free)


def tenants_of(jobs: Iterable[Job[Any]]) -> Counter[str]:
    """How many of the jobs each tenant has."""
    return Counter(job.memory.tenant for job in jobs)


class Line:
    """Jobs that wait, by tenant."""

    def __init__(self) -> None:
        self._jobs: list[QueryJob | RouteJob] = []
        self._served: dict[str, int] = {}
        self._turns = count(1)

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[QueryJob | RouteJob]:
        return iter(self._jobs)

    def add(self, job: QueryJob | RouteJob) -> None:
        """The job comes last among its tenant's."""
        self._jobs.append(job)

    def drop_stopping(self) -> None:
        """Takes out the jobs that are to end."""
        self._jobs = [job for job in self._jobs if job.stopping is None]

    def clear(self) -> None:
        """Takes out all of them."""
        self._jobs.clear()

    def take(self, running: Iterable[QueryJob], places: int) -> list[QueryJob | RouteJob]:
        """Takes out those that start now: while there are places, and one ranking at most."""
        busy = tenants_of(running)
        taken: list[QueryJob | RouteJob] = []
        rankings = 1
        while True:
            starting = [
                job
                for job in self._first_of_each()
                if (
                    rankings
                    if isinstance(job, RouteJob)
                    else has_room(places, busy.total(), busy[job.memory.tenant])
                )
            ]
            if not starting:
                break
            job = min(starting, key=lambda one: self._rank(one.memory.tenant, busy))
            self._jobs.remove(job)
            taken.append(job)
            self._served[job.memory.tenant] = next(self._turns)
            if isinstance(job, RouteJob):
                rankings -= 1
            else:
                busy[job.memory.tenant] += 1
        self._forget(busy)
        return taken

    def _first_of_each(self) -> list[QueryJob | RouteJob]:
        first: dict[str, QueryJob | RouteJob] = {}
        for job in self._jobs:
            first.setdefault(job.memory.tenant, job)
        return list(first.values())

    def _rank(self, tenant: str, busy: Counter[str]) -> tuple[int, int]:
        return busy[tenant], self._served.get(tenant, 0)

    def _forget(self, busy: Counter[str]) -> None:
        """Tenants that neither wait nor run need not be remembered."""
        here = {job.memory.tenant for job in self._jobs} | set(busy)
        self._served = {tenant: turn for tenant, turn in self._served.items() if tenant in here}
