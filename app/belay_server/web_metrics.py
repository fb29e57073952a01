"""Measure a web process with Prometheus's client library.

A single process keeps its metrics in memory. Several processes of one gunicorn serve one port, and
a scrape reaches any of them. So they share files in a folder that gunicorn's configuration makes
(`PROMETHEUS_MULTIPROC_DIR`, the library's own mechanism), and each reports the metrics of all.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from belay_server.domain.metrics import (
    CANCEL_LATENCY,
    PENDING,
    REFERENCE_PREFIX,
    ROLLED_BACK,
    RUNS_ENDED,
)

T = TypeVar("T")
_METHODS = frozenset(("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"))
_REQUESTS, _LATENCY = "belay_http_requests", "belay_http_request_seconds"
#: In seconds: how often the metrics are collected at most. It takes about 30 ms.
_INTERVAL = 0.2
_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Coalesced(Generic[T]):
    """Produces a value at most once per `interval` seconds, for all callers that wait for it.

    A result is never older than the call that returns it: its production began after the call.
    """

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._lock = threading.Lock()
        self._began = 0.0
        self._value: T | None = None
        self._error: Exception | None = None

    def get(self, produce: Callable[[], T]) -> T:
        """Return a value that is produced after this call. Raises what `produce` raises."""
        called = time.monotonic()
        with self._lock:
            if self._began < called:
                time.sleep(max(0.0, self._began + self._interval - time.monotonic()))
                began = time.monotonic()
                value, failure = None, None
                try:
                    value = produce()
                except Exception as error:  # noqa: BLE001  (raised below, to every caller)
                    failure = error
                # Nothing is shared if this caller was interrupted.
                self._began, self._value, self._error = began, value, failure
            value, failure = self._value, self._error
        if failure is not None:
            raise failure
        assert value is not None
        return value


class WebMetrics:
    """The metrics of one web process."""

    def __init__(self, shared_folder: Path | None = None, *, reference_names: bool = False) -> None:
        """With `reference_names`, also expose the requests by LangGraph's names."""
        self._reference_names = reference_names
        #: The text of the metrics, and a summary, for all requests that wait for them.
        self.texts: Coalesced[bytes] = Coalesced(_INTERVAL)
        self.summaries: Coalesced[dict[str, Any]] = Coalesced(_INTERVAL)
        own = self._own = CollectorRegistry()
        self._shared_folder = shared_folder
        self._requests = Counter(
            _REQUESTS,
            "Requests answered, by method, route template and status.",
            ("method", "route", "status"),
            registry=own,
        )
        self._latency = Histogram(
            _LATENCY,
            "Time from a request to its response's first byte, by method and route template.",
            ("method", "route"),
            buckets=_BUCKETS,
            registry=own,
        )
        self._listeners = Gauge(
            "belay_listeners",
            "Connected clients that follow a run: its events, or only its end.",
            ("of",),
            multiprocess_mode="livesum",
            registry=own,
        )
        self._ended = Counter(RUNS_ENDED.name, RUNS_ENDED.says, (RUNS_ENDED.label,), registry=own)
        self._cancel_latency = Histogram(
            CANCEL_LATENCY.name,
            CANCEL_LATENCY.says,
            (CANCEL_LATENCY.label,),
            buckets=CANCEL_LATENCY.buckets,
            registry=own,
        )
        self._waits = Histogram(
            "belay_database_wait_seconds",
            "Time that a request waited for a connection to Postgres.",
            buckets=_BUCKETS,
            registry=own,
        )
        self._by_request: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}
        self._of_events = self._listeners.labels("events")
        self._of_ends = self._listeners.labels("end")
        if shared_folder is None:
            ProcessCollector(registry=own)
            PlatformCollector(registry=own)
            GCCollector(registry=own)

    def waited_for_database(self, seconds: float) -> None:
        """Record how long a request has waited for a connection to Postgres."""
        self._waits.observe(seconds)

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a request whose response has begun, `seconds` after the request."""
        method = method if method in _METHODS else "other"
        key = (method, route, status)
        if key not in self._by_request:  # the look-up by labels is the slowest part
            self._by_request[key] = (
                self._requests.labels(method, route, str(status)),
                self._latency.labels(method, route),
            )
        requests, latency = self._by_request[key]
        requests.inc()
        latency.observe(seconds)

    def listeners_changed(self, wants_events: bool, change: int) -> None:
        (self._of_events if wants_events else self._of_ends).inc(change)

    def ended_unstarted(self, status: str | None) -> None:
        """Count a run that a cancel ended before it started. None: it was rolled back.

        The cancel's own transaction ended it, so the latency is 0.
        """
        self._ended.labels(status or ROLLED_BACK).inc()
        self._cancel_latency.labels(PENDING).observe(0.0)

    def exposition(self, more: Collector) -> bytes:
        """Return these metrics and those of `more` in Prometheus's text format."""
        together = [self._registry(), more]
        if self._reference_names:
            together.append(_ByReferenceNames(together[0]))
        return generate_latest(_Together(together))

    def requests(self) -> list[dict[str, object]]:
        """Return how many requests were answered, by method, route and status."""
        return [
            {**sample.labels, "value": sample.value}
            for metric in self._registry().collect()
            if metric.name == _REQUESTS
            for sample in metric.samples
            if sample.name == f"{_REQUESTS}_total"
        ]

    def _registry(self) -> CollectorRegistry:
        if self._shared_folder is None:
            return self._own
        registry = CollectorRegistry()
        MultiProcessCollector(registry, path=str(self._shared_folder))  # type: ignore[no-untyped-call]
        return registry


class _ByReferenceNames(Collector):
    """The metrics of requests, by the names of LangGraph's server."""

    _names: ClassVar = {
        _REQUESTS: f"{REFERENCE_PREFIX}http_requests",
        _LATENCY: f"{REFERENCE_PREFIX}http_requests_latency_seconds",
    }

    def __init__(self, registry: Collector) -> None:
        self._registry = registry

    def collect(self) -> Iterable[Metric]:
        for metric in self._registry.collect():
            if (name := self._names.get(metric.name)) is None:
                continue
            renamed = Metric(name, metric.documentation, metric.type)
            for sample in metric.samples:
                renamed.add_sample(
                    sample.name.replace(metric.name, name, 1), sample.labels, sample.value
                )
            yield renamed


class _Together(CollectorRegistry):
    """Combines several collectors into one registry."""

    def __init__(self, collectors: Iterable[Collector]) -> None:
        super().__init__()
        self._all = tuple(collectors)

    def collect(self) -> Iterable[Metric]:
        for collector in self._all:
            yield from collector.collect()
