"""Which graphs share processes: by the configuration, or by the kind of their nodes.

`isolation` in `langgraph.json`, or BELAY_ISOLATION for the graphs that it does not name, says
`process`, `shared` or `auto`. With `auto` a graph shares hosts if each of its nodes has an
asynchronous implementation: another is executed on a thread, which cannot be interrupted. With a
debugger, which stops a whole process, none does. Nor does the graph of agent runs: the check of an
output against its client's schema may take very long.
"""

from __future__ import annotations

from dataclasses import dataclass

from belay_server.configuration.settings import AUTO, SHARED, Settings
from belay_server.graphs.project.langgraph_json import Project
from belay_server.graphs.registry import GraphRegistry
from belay_server.graphs.synchronous_nodes import synchronous_node


@dataclass(frozen=True, slots=True)
class Isolation:
    """Where the runs of a graph are executed, and why."""

    is_shared: bool
    reason: str


def isolation_of(settings: Settings, graphs: GraphRegistry, graph_id: str) -> Isolation:
    """Return where the runs of a graph are executed, unless a worker has isolated it.

    With `auto` this looks at the loaded graph. One that is not loaded, or that a factory makes for
    each run, has processes of its own.
    """
    project = graphs.project
    if graph_id == project.agent_runs_graph:
        return Isolation(False, "the graph of agent runs never shares hosts")
    if settings.debug_port:
        return Isolation(False, "a debugger stops a whole process")
    declared = project.graphs[graph_id].isolation
    if (isolation := declared or settings.isolation) == AUTO:
        return _by_nodes(graphs, graph_id)
    named = "isolation in langgraph.json" if declared else "BELAY_ISOLATION, or its default"
    return Isolation(isolation == SHARED, named)


def shared_graphs(settings: Settings, graphs: GraphRegistry) -> list[str]:
    """Return the loaded graphs whose runs share hosts, unless a worker has isolated them."""
    return [one for one in graphs.graph_ids if isolation_of(settings, graphs, one).is_shared]


def _by_nodes(graphs: GraphRegistry, graph_id: str) -> Isolation:
    graph = graphs.compiled(graph_id)
    if graph is None:
        return Isolation(False, "a factory makes the graph for each run, or it is not loaded")
    if (node := synchronous_node(graph)) is not None:
        return Isolation(False, f"the node {node} is synchronous")
    return Isolation(True, "all nodes are asynchronous")


def may_share(settings: Settings, project: Project) -> bool:
    """Return whether a graph of a project that is not loaded yet may share hosts."""
    words = {graph.isolation or settings.isolation for graph in project.graphs.values()}
    return bool(words & {AUTO, SHARED})
