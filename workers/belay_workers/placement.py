"""Where the runs of one worker's graphs are executed: in hosts, or in processes of their own."""

from __future__ import annotations

import os
from collections.abc import Sequence

from belay_server.configuration.settings import Settings
from belay_server.graphs.isolation import isolation_of
from belay_server.graphs.registry import GraphRegistry


class Placement:
    """The places of the graphs of one worker's project."""

    def __init__(self, settings: Settings, graph_ids: Sequence[str], shared: Sequence[str]) -> None:
        """`shared` are those of the graphs whose runs share hosts."""
        self.shared_graphs = list(shared)
        #: Whether a run may need a process of its own.
        self.needs_children = len(shared) < len(graph_ids)
        #: How many runs share hosts at once, as configured; 0 if none does.
        self.hosted_runs = settings.shared_concurrency if shared else 0
        #: How many hosts there are at most.
        self.hosts = (settings.run_hosts or os.cpu_count() or 1) if shared else 0

    @classmethod
    def of(cls, settings: Settings, graphs: GraphRegistry) -> Placement:
        """Return the places of loaded graphs."""
        ids = graphs.graph_ids
        shared = [one for one in ids if isolation_of(settings, graphs, one).is_shared]
        return cls(settings, ids, shared)

    def hosted_of(self, runs: int) -> int:
        """Return how many of a worker's runs at once may be hosted: an option of Celery's may have
        set their number."""
        return min(self.hosted_runs, runs - self.needs_children)
