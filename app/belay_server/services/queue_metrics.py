"""Export pending and running runs as metrics, read from Postgres at each scrape.

Every web process exports the same values, so a scrape may reach any of them. Do not sum them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from belay_server.db.postgres.pool import Database
from belay_server.db.queues import QueueState, queue_states
from belay_server.domain.errors import Unavailable
from belay_server.domain.metrics import REFERENCE_PREFIX

log = logging.getLogger(__name__)


class QueueCollector(Collector):
    """Collects the metrics of all queues with one query. While Postgres is unavailable,
    `belay_database_up` is 0 and the other metrics here are absent, so that the scrape still returns
    the metrics of the process."""

    def __init__(
        self, database: Database, queues: Sequence[str], *, reference_names: bool = False
    ) -> None:
        """With `reference_names`, also collect the totals by LangGraph's names."""
        self._database = database
        self._queues = queues
        self._reference_names = reference_names

    def collect(self) -> Iterable[Metric]:
        up = GaugeMetricFamily("belay_database_up", "Whether Postgres answered this scrape.")
        try:
            with self._database.connection() as conn:
                states = queue_states(conn)
        except Unavailable as error:
            log.warning("cannot read the metrics of the queues, leaving them out: %s", error)
            up.add_metric([], 0)
            return [up]
        up.add_metric([], 1)
        found = [up, *_families(_with_empty([s for s in states if s.queue], self._queues))]
        return [*found, *_by_reference_names(states)] if self._reference_names else found


def _with_empty(states: Sequence[QueueState], queues: Sequence[str]) -> list[QueueState]:
    """Return the states, with zeros for each queue that has no runs."""
    seen = {state.queue for state in states}
    empty = [QueueState(queue, 0, 0, 0, 0, 0.0, 0.0, 0.0) for queue in queues if queue not in seen]
    return [*states, *empty]


def _families(states: Sequence[QueueState]) -> Iterable[Metric]:
    runs = GaugeMetricFamily(
        "belay_runs", "Runs that have not ended, by queue and status.", labels=["queue", "status"]
    )
    depth = GaugeMetricFamily(
        "belay_queue_depth",
        "Pending runs that are due: all, and those not behind another run of their thread.",
        labels=["queue", "which"],
    )
    age = GaugeMetricFamily(
        "belay_queue_age_seconds",
        "How long the oldest of these runs has been due.",
        labels=["queue", "which"],
    )
    for state in states:
        queue = state.queue or ""
        runs.add_metric([queue, "pending"], state.pending)
        runs.add_metric([queue, "running"], state.running)
        depth.add_metric([queue, "due"], state.due)
        depth.add_metric([queue, "claimable"], state.claimable)
        age.add_metric([queue, "due"], state.oldest_seconds)
        age.add_metric([queue, "claimable"], state.oldest_claimable_seconds)
    return (runs, depth, age)


def _by_reference_names(states: Sequence[QueueState]) -> Iterable[Metric]:
    total = next(state for state in states if state.queue is None)
    values = {
        "num_pending_runs": ("Pending runs.", total.pending),
        "num_running_runs": ("Running runs.", total.running),
        "pending_runs_wait_time_max": (
            "Seconds that the oldest pending run has been due.",
            total.oldest_seconds,
        ),
        "pending_runs_wait_time_med": (
            "Seconds that half of the pending runs have been due.",
            total.median_seconds,
        ),
        "pending_unblocked_runs_wait_time_max": (
            "The same as the maximum, of runs that are not behind another run of their thread.",
            total.oldest_claimable_seconds,
        ),
    }
    return [
        GaugeMetricFamily(f"{REFERENCE_PREFIX}{name}", says, value=value)
        for name, (says, value) in values.items()
    ]


def queue_summary(database: Database) -> dict[str, Any]:
    """Return the totals of all queues, with the field names of LangGraph's own server.

    Raises Unavailable.
    """
    with database.connection() as conn:
        total = next(state for state in queue_states(conn) if state.queue is None)
    return {
        "n_pending": total.pending,
        "n_running": total.running,
        "pending_runs_wait_time_max_secs": total.oldest_seconds,
        "pending_runs_wait_time_med_secs": total.median_seconds,
        "pending_unblocked_runs_wait_time_max_secs": total.oldest_claimable_seconds,
    }
