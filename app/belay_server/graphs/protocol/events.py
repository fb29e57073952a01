"""A run's event log as version 2 of the streaming protocol tells it.

The protocol's types are `langchain_protocol`'s. The log has what the worker streamed; here each of
its events becomes one or several of the protocol's, always the same ones in the same order, so that
a number counted from the run's start says the same place to every client and every web process.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from belay_server.graphs.protocol.messages import MessageEvents

CHANNELS = ("values", "updates", "messages", "tools", "custom", "lifecycle", "input", "tasks")
#: Also taken, though the reference's list of what is allowed leaves it out.
MORE_CHANNELS = ("checkpoints",)
#: What a run has to stream so that every channel has what it is for.
STREAM_MODES = (
    "values",
    "updates",
    "messages-tuple",
    "custom",
    "tasks",
    "checkpoints",
    "tools",
)
_INTERRUPT = "__interrupt__"
Said = tuple[str, tuple[str, ...], Any]


def is_channel(name: str) -> bool:
    """`custom:<name>` is one too: the custom events that carry that name."""
    prefix, _, rest = name.partition(":")
    return name in CHANNELS or name in MORE_CHANNELS or (prefix == "custom" and bool(rest))


@dataclass(slots=True)
class RunStory:
    """What has been told of one run. Every method yields (method, namespace, data)."""

    graph_id: str | None
    _messages: dict[tuple[str, ...], MessageEvents] = field(
        default_factory=lambda: defaultdict(MessageEvents)
    )
    #: Subgraphs that have begun and not ended.
    _children: dict[tuple[str, ...], None] = field(default_factory=dict)
    #: Where each question came from, by its id. They are told when the run has ended: not before
    #: that does the thread take an answer.
    _asked: dict[str, tuple[str, ...]] = field(default_factory=dict)
    _error: str | None = None

    def begins(self) -> Iterator[Said]:
        yield self._lifecycle((), "running", graph_name=self.graph_id)

    def tells(self, name: str, data: Any) -> Iterator[Said]:
        """`name` and `data` of an event of the log."""
        mode, *rest = name.split("|")
        namespace = tuple(rest)
        if mode in ("metadata", "end"):
            return
        if mode == "error":
            self._error = str(data.get("message") or data.get("error") or "")
            return
        yield from self._subgraph_begins(namespace)
        if mode == "messages":
            message, metadata = data
            yield from self._say_messages(namespace, message, metadata)
        elif mode == "values":
            yield from self._values(namespace, data)
        elif mode == "updates":
            yield from self._updates(namespace, data)
        elif mode == "tasks":
            yield from self._task(namespace, data)
        elif mode == "checkpoints":
            yield ("checkpoints", namespace, _checkpoint(data))
        elif mode == "custom":
            yield ("custom", namespace, _custom(data))
        elif mode == "tools":
            yield ("tools", namespace, data)

    def ends(
        self, status: str | None, error: Mapping[str, Any] | None, interrupts: Sequence[Any]
    ) -> Iterator[Said]:
        """`status` as the run's row has it; None for a run that was rolled back."""
        for namespace in list(self._messages):
            yield from self._finish_messages(namespace)
        for question in interrupts:
            yield self._question(question)
        if status == "success":
            event = "interrupted" if interrupts else "completed"
        else:
            event = "failed" if status in ("error", "timeout") else "interrupted"
        for child in reversed(self._children):
            yield self._lifecycle(child, event)
        self._children.clear()
        if event != "failed":
            yield self._lifecycle((), event, graph_name=self.graph_id)
            return
        message = self._error or str((error or {}).get("message") or "")
        yield self._lifecycle((), event, graph_name=self.graph_id, error=message)

    def _lifecycle(self, namespace: tuple[str, ...], event: str, **more: str | None) -> Said:
        if namespace:
            more.setdefault("graph_name", namespace[-1].partition(":")[0])
        known = {key: value for key, value in more.items() if value is not None}
        return ("lifecycle", namespace, {"event": event, **known})

    def _subgraph_begins(self, namespace: tuple[str, ...]) -> Iterator[Said]:
        for depth in range(1, len(namespace) + 1):
            child = namespace[:depth]
            if child not in self._children:
                self._children[child] = None
                yield self._lifecycle(child, "started")

    def _values(self, namespace: tuple[str, ...], data: Any) -> Iterator[Said]:
        yield from self._finish_messages(namespace)
        asked = data.get(_INTERRUPT) if isinstance(data, dict) else None
        if asked is not None:
            data = {key: value for key, value in data.items() if key != _INTERRUPT}
            self._note_questions(namespace, asked)
        yield ("values", namespace, data)

    def _updates(self, namespace: tuple[str, ...], data: Any) -> Iterator[Said]:
        yield from self._finish_messages(namespace)
        for node, values in data.items() if isinstance(data, dict) else ():
            if node == _INTERRUPT:
                self._note_questions(namespace, values)
            elif node != "__metadata__":
                yield ("updates", namespace, {"node": node, "values": values})

    def _task(self, namespace: tuple[str, ...], data: Any) -> Iterator[Said]:
        if "result" not in data and "error" not in data:
            yield ("tasks", namespace, data)
            return
        yield from self._finish_messages(namespace)
        # One that keeps its checkpoints from run to run has the node's name and no more.
        names = (f"{data.get('name')}:{data.get('id')}", data.get("name"))
        children = [(*namespace, name) for name in names]
        for begun in self._below(children):
            del self._children[begun]
            yield from self._finish_messages(begun)
            if begun in children and data.get("error"):
                yield self._lifecycle(begun, "failed", error=str(data["error"]))
            else:
                event = "interrupted" if data.get("interrupts") else "completed"
                yield self._lifecycle(begun, event)
        yield ("tasks", namespace, data)

    def _below(self, roots: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
        """Return those of the roots that have begun, and the subgraphs within them."""
        begun = [root for root in roots if root in self._children]
        if not begun:
            return []
        depth = len(begun[0])
        return [child for child in self._children if child[:depth] in begun]

    def _note_questions(self, namespace: tuple[str, ...], asked: Sequence[Any]) -> None:
        """A subgraph's question is its parents' too: the deepest one asks it."""
        for question in asked:
            if len(namespace) >= len(self._asked.get(question["id"], ())):
                self._asked[question["id"]] = namespace

    def _question(self, question: Mapping[str, Any]) -> Said:
        value = question.get("value")
        # The Python SDK reads `value` where the protocol says `payload`.
        told = {"interrupt_id": question["id"], "payload": value, "value": value}
        return ("input.requested", self._asked.get(question["id"], ()), told)

    def _say_messages(
        self, namespace: tuple[str, ...], message: Mapping[str, Any], metadata: Mapping[str, Any]
    ) -> Iterator[Said]:
        for event in self._messages[namespace].take(message, metadata):
            yield ("messages", namespace, event)

    def _finish_messages(self, namespace: tuple[str, ...]) -> Iterator[Said]:
        if namespace in self._messages:
            for event in self._messages.pop(namespace).finish():
                yield ("messages", namespace, event)


def _checkpoint(data: Mapping[str, Any]) -> dict[str, Any]:
    """Which checkpoint was stored; its values have a channel of their own."""
    metadata = data.get("metadata") or {}
    stored = {
        "id": _checkpoint_id(data.get("config")),
        "step": metadata.get("step"),
        "source": metadata.get("source"),
    }
    parent = _checkpoint_id(data.get("parent_config"))
    return stored if parent is None else {**stored, "parent_id": parent}


def _checkpoint_id(config: Mapping[str, Any] | None) -> str | None:
    configurable = (config or {}).get("configurable") or {}
    checkpoint_id: str | None = configurable.get("checkpoint_id")
    return checkpoint_id


def _custom(data: Any) -> dict[str, Any]:
    """What a node wrote. A `name` in it makes it an event of the channel `custom:<name>`."""
    name = data.get("name") if isinstance(data, dict) else None
    if not isinstance(name, str) or not name:
        return {"payload": data}
    return {"name": name, "payload": data.get("payload", data)}
