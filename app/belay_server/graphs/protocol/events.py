"""Translation of a run's event log into events of version 2 of the streaming protocol.

The protocol's types are `langchain_protocol`'s. The log has what the worker streamed. Each of its
events becomes none, one or several protocol events, always the same ones in the same order. So a
number counted from the run's start means the same event to every client and every web process.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from belay_server.graphs.protocol.messages import MessageEvents

CHANNELS = ("values", "updates", "messages", "tools", "custom", "lifecycle", "input", "tasks")
#: Also accepted, although it is not in the reference's list of allowed channels.
MORE_CHANNELS = ("checkpoints",)
#: The stream modes that a run needs so that every channel has its events.
STREAM_MODES = (
    "values",
    "updates",
    "messages-tuple",
    "custom",
    "tasks",
    "checkpoints",
    "tools",
)
#: The key of the list of interrupts in the values and updates of a run.
INTERRUPT = "__interrupt__"
ProtocolEvent = tuple[str, tuple[str, ...], Any]


def is_channel(name: str) -> bool:
    """Return True for a channel. `custom:<name>` is one: the custom events with that name."""
    prefix, _, rest = name.partition(":")
    return name in CHANNELS or name in MORE_CHANNELS or (prefix == "custom" and bool(rest))


@dataclass(slots=True)
class RunTranslator:
    """The events that one run has had. The public methods yield (method, namespace, data)."""

    graph_id: str | None
    _messages: dict[tuple[str, ...], MessageEvents] = field(
        default_factory=lambda: defaultdict(MessageEvents)
    )
    #: Subgraphs that have started and not ended.
    _children: dict[tuple[str, ...], None] = field(default_factory=dict)
    #: The namespace of each interrupt, by its id. Interrupts are sent when the run has ended: only
    #: then can the thread be resumed.
    _namespaces_of_interrupts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    _error: str | None = None

    def begin(self) -> Iterator[ProtocolEvent]:
        yield self._lifecycle((), "running", graph_name=self.graph_id)

    def translate(self, name: str, data: Any) -> Iterator[ProtocolEvent]:
        """Yield the protocol events of an event of the log, given by its `name` and `data`."""
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

    def end(
        self, status: str | None, error: Mapping[str, Any] | None, interrupts: Sequence[Any]
    ) -> Iterator[ProtocolEvent]:
        """Yield the events of the run's end. `status` is that of its row; None after a rollback."""
        for namespace in list(self._messages):
            yield from self._finish_messages(namespace)
        for interrupt in interrupts:
            yield self._interrupt(interrupt)
        if status == "success":
            # The row has no interrupts that are larger than BELAY_MAX_OUTCOME_BYTES.
            event = "interrupted" if interrupts or self._namespaces_of_interrupts else "completed"
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

    def _lifecycle(
        self, namespace: tuple[str, ...], event: str, **more: str | None
    ) -> ProtocolEvent:
        if namespace:
            more.setdefault("graph_name", namespace[-1].partition(":")[0])
        known = {key: value for key, value in more.items() if value is not None}
        return ("lifecycle", namespace, {"event": event, **known})

    def _subgraph_begins(self, namespace: tuple[str, ...]) -> Iterator[ProtocolEvent]:
        for depth in range(1, len(namespace) + 1):
            child = namespace[:depth]
            if child not in self._children:
                self._children[child] = None
                yield self._lifecycle(child, "started")

    def _values(self, namespace: tuple[str, ...], data: Any) -> Iterator[ProtocolEvent]:
        yield from self._finish_messages(namespace)
        interrupts = data.get(INTERRUPT) if isinstance(data, dict) else None
        if interrupts is not None:
            data = {key: value for key, value in data.items() if key != INTERRUPT}
            self._note_interrupts(namespace, interrupts)
        yield ("values", namespace, data)

    def _updates(self, namespace: tuple[str, ...], data: Any) -> Iterator[ProtocolEvent]:
        yield from self._finish_messages(namespace)
        for node, values in data.items() if isinstance(data, dict) else ():
            if node == INTERRUPT:
                self._note_interrupts(namespace, values)
            elif node != "__metadata__":
                yield ("updates", namespace, {"node": node, "values": values})

    def _task(self, namespace: tuple[str, ...], data: Any) -> Iterator[ProtocolEvent]:
        if "result" not in data and "error" not in data:
            yield ("tasks", namespace, data)
            return
        yield from self._finish_messages(namespace)
        # A subgraph that keeps its checkpoints between runs has the node's name without an id.
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
        """Return those of the roots that have started, and the subgraphs within them."""
        begun = [root for root in roots if root in self._children]
        if not begun:
            return []
        depth = len(begun[0])
        return [child for child in self._children if child[:depth] in begun]

    def _note_interrupts(self, namespace: tuple[str, ...], interrupts: Sequence[Any]) -> None:
        """Note the namespaces of interrupts. A subgraph's interrupt is also reported by its
        parents: the deepest namespace counts."""
        for interrupt in interrupts:
            if len(namespace) >= len(self._namespaces_of_interrupts.get(interrupt["id"], ())):
                self._namespaces_of_interrupts[interrupt["id"]] = namespace

    def _interrupt(self, interrupt: Mapping[str, Any]) -> ProtocolEvent:
        value = interrupt.get("value")
        # The Python SDK reads `value` where the protocol has `payload`.
        data = {"interrupt_id": interrupt["id"], "payload": value, "value": value}
        return ("input.requested", self._namespaces_of_interrupts.get(interrupt["id"], ()), data)

    def _say_messages(
        self, namespace: tuple[str, ...], message: Mapping[str, Any], metadata: Mapping[str, Any]
    ) -> Iterator[ProtocolEvent]:
        for event in self._messages[namespace].take(message, metadata):
            yield ("messages", namespace, event)

    def _finish_messages(self, namespace: tuple[str, ...]) -> Iterator[ProtocolEvent]:
        if namespace in self._messages:
            for event in self._messages.pop(namespace).finish():
                yield ("messages", namespace, event)


def _checkpoint(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return which checkpoint was stored. Its values have a channel of their own."""
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
    """Return the data of a custom event. A `name` in it selects the channel `custom:<name>`."""
    name = data.get("name") if isinstance(data, dict) else None
    if not isinstance(name, str) or not name:
        return {"payload": data}
    return {"name": name, "payload": data.get("payload", data)}
