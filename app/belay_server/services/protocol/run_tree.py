"""Build the tree of a run: its graph, and the subgraphs that its event log names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import orjson

from belay_server.bus.client import RedisError
from belay_server.bus.event_log import START, Event, EventLog
from belay_server.domain.errors import Unavailable
from belay_server.runtime.turns import wait_for_turn

#: The most log entries that are read for a tree, and how many are read at once.
_MOST_ENTRIES = 5_000
_PAGE = 50
#: Larger results are not decoded: such a task counts as not yet ended.
_LARGEST_TASK = 64 * 1024
Namespace = tuple[str, ...]


@dataclass(slots=True)
class Tree:
    """A run or one of its subgraphs, as the protocol's `AgentTreeNode`."""

    namespace: Namespace
    status: str
    graph_name: str
    children: list[Tree] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        shown = {
            "namespace": list(self.namespace),
            "status": self.status,
            "graph_name": self.graph_name,
        }
        children = [child.as_json() for child in self.children]
        return {**shown, "children": children} if children else shown


def run_tree(log: EventLog, run_id: UUID, *, graph_name: str, status: str) -> Tree:
    """Return the tree of a run. A subgraph has the run's status, unless its task has ended.

    Subgraphs that are first named after 5,000 log entries are missing. Raises Unavailable.
    """
    found: dict[Namespace, None] = {}
    ended: dict[Namespace, str] = {}
    for event in _events(log, run_id):
        mode, *rest = event.name.split("|")
        namespace = tuple(rest)
        for depth in range(1, len(namespace) + 1):
            found.setdefault(namespace[:depth])
        if mode == "tasks":
            ended |= _ended_by(event, namespace)
    root = Tree((), status, graph_name)
    nodes: dict[Namespace, Tree] = {(): root}
    for namespace in found:
        name = namespace[-1].partition(":")[0]
        nodes[namespace] = node = Tree(namespace, ended.get(namespace, status), name)
        nodes[namespace[:-1]].children.append(node)
    return root


def _events(log: EventLog, run_id: UUID) -> Iterator[Event]:
    last = START
    for _ in range(_MOST_ENTRIES // _PAGE):
        try:
            events, more = log.read_after(run_id, last, count=_PAGE)
        except RedisError as error:
            raise Unavailable("Redis cannot be reached") from error
        yield from events
        if not more or not events:
            return
        last = events[-1].position
        wait_for_turn()


def _ended_by(event: Event, namespace: Namespace) -> dict[Namespace, str]:
    """Return the status of the subgraphs that a task's result has ended. A subgraph that keeps its
    checkpoints between runs has the node's name without the task's id."""
    if len(event.data) > _LARGEST_TASK:
        return {}
    task = orjson.loads(event.data)
    has_ended = "result" in task or "error" in task
    if not has_ended or task.get("interrupts"):
        return {}
    status = "failed" if task.get("error") else "completed"
    name = str(task.get("name"))
    return {(*namespace, one): status for one in (f"{name}:{task.get('id')}", name)}
