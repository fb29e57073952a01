"""Where the runs of one worker's graphs are executed: in hosts, or in processes of their own."""

from __future__ import annotations

import os

from belay_server.configuration.settings import Settings
from belay_server.graphs.isolation import shared_graphs
from belay_server.graphs.registry import GraphRegistry


def most_hosts(settings: Settings) -> int:
    """Return how many hosts a worker may have, if there are graphs that share hosts."""
    return settings.run_hosts or os.cpu_count() or 1


class Placement:
    """The places of the graphs of one worker's project."""

    def __init__(self, settings: Settings, graphs: GraphRegistry) -> None:
        """`graphs` have been loaded: with `auto`, the places depend on their nodes."""
        #: The graphs whose runs share hosts.
        self.shared_graphs = shared_graphs(settings, graphs)
        #: Whether a run may need a process of its own.
        self.needs_children = len(self.shared_graphs) < len(graphs.graph_ids)
        #: How many runs share hosts at once, as configured; 0 if none does.
        self.hosted_runs = settings.shared_concurrency if self.shared_graphs else 0
        #: How many hosts there are at most.
        self.hosts = most_hosts(settings) if self.shared_graphs else 0

    def hosted_of(self, runs: int) -> int:
        """Return how many of a worker's runs at once may be hosted: an option of Celery's may have
        set their number."""
        return min(self.hosted_runs, runs - self.needs_children)
