"""Which graphs share processes, by the configuration.

A graph shares a host if `isolation` in `langgraph.json`, or BELAY_ISOLATION for the graphs that it
does not name, says `shared`. With a debugger, which stops a whole process, none does. Nor does the
graph of agent runs: the check of an output against its client's schema may take very long.
"""

from __future__ import annotations

from dataclasses import dataclass

from belay_server.configuration.settings import SHARED, Settings
from belay_server.graphs.project.langgraph_json import Project


@dataclass(frozen=True, slots=True)
class Isolation:
    """Where the runs of a graph are executed, and why."""

    is_shared: bool
    reason: str


def isolation_of(settings: Settings, project: Project, graph_id: str) -> Isolation:
    """Return where the runs of a graph are executed, unless a worker has isolated it."""
    if graph_id == project.agent_runs_graph:
        return Isolation(False, "the graph of agent runs never shares hosts")
    if settings.debug_port:
        return Isolation(False, "a debugger stops a whole process")
    if (declared := project.graphs[graph_id].isolation) is not None:
        return Isolation(declared == SHARED, "isolation in langgraph.json")
    return Isolation(settings.isolation == SHARED, "BELAY_ISOLATION, or its default")
