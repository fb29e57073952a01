"""The worker's Prometheus port, served by its parent process: the metrics of all its processes.

Nothing here runs unless `BELAY_WORKER_METRICS_PORT` is set. The children are not involved: they
only write to `belay_workers.counters`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from belay_server.domain.metrics import Counted, Timed
from belay_workers.background_thread import BackgroundThread
from belay_workers.counters import COUNTERS, HISTOGRAMS, Times
from belay_workers.slots import Kind, SlotTable

log = logging.getLogger(__name__)

_RETRY_SECONDS = 2.0


class WorkerMetrics:
    """Serves the metrics on a port.

    A thread retries while the port is taken: the previous worker may still be shutting down.
    """

    def __init__(self, slots: SlotTable, port: int) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_RunCollector(slots))
        ProcessCollector(registry=self._registry)
        self._port = port
        self._stopping = threading.Event()
        self._thread = BackgroundThread("metrics", self._serve, self._stopping)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()

    def _serve(self) -> None:
        complained = False
        while not self._stopping.is_set():
            try:
                server, _ = start_http_server(self._port, registry=self._registry)
            except OSError as error:
                if not complained:
                    log.warning("cannot serve metrics on port %d; retrying: %s", self._port, error)
                    complained = True
                self._stopping.wait(_RETRY_SECONDS)
                continue
            log.info("serving metrics on port %d", self._port)
            self._stopping.wait()
            server.shutdown()
            server.server_close()


class _RunCollector(Collector):
    """Sums the counters of all processes at each scrape."""

    def __init__(self, slots: SlotTable) -> None:
        self._slots = slots

    def collect(self) -> Iterable[Metric]:
        for counter in COUNTERS:
            yield self._counter(counter)
        for histogram in HISTOGRAMS:
            yield self._histogram(histogram)
        yield from self._children()

    def _counter(self, counter: Counted) -> Metric:
        family = CounterMetricFamily(counter.name, counter.says, labels=[counter.label])
        for value in counter.values:
            family.add_metric([value], self._slots.counter_table.count(counter, value))
        return family

    def _histogram(self, histogram: Timed) -> Metric:
        labels = [histogram.label] if histogram.label else []
        family = HistogramMetricFamily(histogram.name, histogram.says, labels=labels)
        for value in histogram.values:
            times = self._slots.counter_table.times(histogram, value)
            family.add_metric(
                [value] if labels else [], list(_cumulated(histogram, times)), times.sum
            )
        return family

    def _children(self) -> Iterator[Metric]:
        slots = self._slots.read_all()
        readings = [one for one in slots if one.kind is Kind.CHILD]
        busy = sum(reading.is_busy for reading in readings)
        family = GaugeMetricFamily(
            "belay_worker_children", "Child processes of this worker, by state.", labels=["state"]
        )
        family.add_metric(["busy"], busy)
        family.add_metric(["idle"], len(readings) - busy)
        yield family
        hosted = sum(one.is_busy for one in slots if one.kind is Kind.HOSTED_RUN)
        yield GaugeMetricFamily(
            "belay_worker_hosted_runs", "Runs that share this worker's hosts.", value=hosted
        )


def _cumulated(histogram: Timed, times: Times) -> Iterator[tuple[str, float]]:
    bounds = [*(str(float(bound)) for bound in histogram.buckets), "+Inf"]
    return zip(bounds, accumulate(times.counts), strict=True)
