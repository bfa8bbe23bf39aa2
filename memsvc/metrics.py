"""Counts for a Prometheus server, off unless `metrics_listen` is set.

Labels are names of calls, outcomes and models, so there are only so many, and nothing
that a user wrote is among them. Tenants' ids are a label when the operator asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Histogram, start_http_server
from prometheus_client.metrics_core import GaugeMetricFamily
from prometheus_client.registry import Collector

#: Answers take seconds, reads milliseconds.
_BUCKETS_S = (0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 60.0)
#: With tenants as a label: those after so many are counted as "other".
_MAX_TENANTS = 1000

Gauges = Callable[[], tuple[int, Mapping[str, int]]]


class Metrics:
    """What is counted. Safe to read from another thread.

    by_tenant: counts calls by tenant as well.
    """

    def __init__(self, *, by_tenant: bool = False) -> None:
        self.registry = CollectorRegistry()
        self._by_tenant = by_tenant
        self._tenants: set[str] = set()
        labels = ("method", "outcome", *(("tenant",) if by_tenant else ()))
        self._calls = Counter(
            "memsvc_calls",
            "Calls by outcome: OK, an ErrorReason, or LEFT.",
            labels,
            registry=self.registry,
        )
        self._seconds = Histogram(
            "memsvc_call_seconds",
            "How long calls took, streams to their end.",
            ("method",),
            buckets=_BUCKETS_S,
            registry=self.registry,
        )

    def call(self, method: str, outcome: str, seconds: float, tenant_id: str) -> None:
        """A call has ended. tenant_id: empty for one that was not let in."""
        name = method.rpartition("/")[2]
        tenant = (self._known(tenant_id),) if self._by_tenant else ()
        self._calls.labels(name, outcome, *tenant).inc()
        self._seconds.labels(name).observe(seconds)

    def watch(self, gauges: Gauges) -> None:
        """gauges: calls inside, and documents that wait by model; asked at each scrape."""
        self.registry.register(_Now(gauges))

    @contextmanager
    def served(self, listen: str) -> Iterator[int]:
        """Serves the text format over HTTP at host:port; yields the port. Raises OSError."""
        host, _, port = listen.rpartition(":")
        server, thread = start_http_server(int(port), host, self.registry)
        try:
            yield server.server_port
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def _known(self, tenant_id: str) -> str:
        if tenant_id and len(self._tenants) < _MAX_TENANTS:
            self._tenants.add(tenant_id)
        return tenant_id if tenant_id in self._tenants else "other"


class _Now(Collector):
    """Values that are looked up and not counted."""

    def __init__(self, gauges: Gauges) -> None:
        self._gauges = gauges

    def collect(self) -> Iterator[GaugeMetricFamily]:
        inside, waiting = self._gauges()
        yield GaugeMetricFamily("memsvc_calls_inside", "Calls inside now.", value=inside)
        documents = GaugeMetricFamily(
            "memsvc_waiting_documents", "Documents that wait for encoding.", labels=("model",)
        )
        for model_id, count in waiting.items():
            documents.add_metric([model_id], count)
        yield documents
