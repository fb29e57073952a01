"""Reading and writing the states of threads through a graph without running its nodes.

The dicts are ThreadState and its parts in the SDK's schema.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

import orjson
import psycopg
from langgraph.checkpoint.base import CheckpointTuple
from langgraph.errors import InvalidUpdateError
from langgraph.types import PregelTask, StateSnapshot, StateUpdate

from belay_server.domain.errors import BelayError, StateUnreadable, TooMuch, Unavailable
from belay_server.graphs.checkpoints.thread_saver import LargeState, ThreadSaver
from belay_server.graphs.commands import to_command
from belay_server.graphs.project.loading import ProjectError
from belay_server.graphs.project.raised import is_of_project
from belay_server.graphs.registry import Graph
from belay_server.graphs.serde import to_json, to_plain
from belay_server.runtime.turns import wait_for_turn

log = logging.getLogger(__name__)

#: Replaces the message of a graph's exception where it is hidden.
REDACTED = "An internal error occurred"
#: The state of a thread without any checkpoint.
EMPTY_STATE: dict[str, Any] = {
    "values": {},
    "next": [],
    "tasks": [],
    "metadata": None,
    "created_at": None,
    "checkpoint": None,
    "parent_checkpoint": None,
    "interrupts": [],
    "checkpoint_id": None,
    "parent_checkpoint_id": None,
}


class StateRefused(Exception):
    """The graph did not accept the state. Nothing was written."""


@dataclass(frozen=True, slots=True)
class Resting:
    """The fields that a thread's row takes from its newest checkpoint."""

    values: Any
    interrupts: dict[str, list[dict[str, Any]]]
    has_next: bool

    @property
    def status(self) -> str:
        return resting_status(self.has_next, self.interrupts)


def resting_status(has_next: object, interrupts: object) -> str:
    """Return the status of a thread without active runs."""
    return "interrupted" if has_next or interrupts else "idle"


def bound(graph: Graph, saver: Any, store: Any = None) -> Graph:
    """Return a copy of the graph with this checkpointer and store. The registered graph is not
    changed."""
    graph = copy.copy(graph)
    graph.checkpointer = saver
    if store is not None:
        graph.store = store
    return graph


#: Limits on the states of a history that are read at once: their number, about how many bytes.
_MOST_AT_ONCE = 50
_BYTES_AT_ONCE = 4 * 1024 * 1024


def thread_config(thread_id: str, checkpoint: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the config that addresses a thread's newest checkpoint, or the given one."""
    configurable: dict[str, Any] = {"thread_id": thread_id, "checkpoint_ns": ""}
    for key in ("checkpoint_ns", "checkpoint_id", "checkpoint_map"):
        if checkpoint and checkpoint.get(key) is not None:
            configurable[key] = checkpoint[key]
    return {"configurable": configurable}


#: Exceptions that do not come from the graph's own code.
_OURS = (BelayError, psycopg.Error, LargeState, MemoryError, orjson.JSONDecodeError)


@contextmanager
def graph_code(*, redact_errors: bool) -> Iterator[None]:
    """Raise StateUnreadable for an exception of the graph's own code, such as a reducer."""
    try:
        yield
    except (*_OURS, ProjectError):
        raise
    except BaseException as error:
        if not is_of_project(error):
            raise
        shown = REDACTED if redact_errors else f"{type(error).__name__}: {error}"
        raise StateUnreadable(f"The thread's graph cannot read its state: {shown}") from error


def read_snapshot(
    graph: Graph, saver: ThreadSaver, config: dict[str, Any], *, subgraphs: bool = False
) -> StateSnapshot:
    """Return the state at `config`. Raise LargeState if it is too large.

    LangGraph applies pending writes and looks for the next nodes. A run that failed because a
    reducer or the state's schema did not accept its input makes that fail at every read. Then
    return what `as_stored` returns.
    """
    try:
        return bound(graph, saver).get_state(config, subgraphs=subgraphs)  # type: ignore[arg-type]
    except _OURS:
        raise
    except BaseException as error:
        if not is_of_project(error):
            raise
        stored = saver.get_tuple(config)
        if stored is None:
            raise
        log.debug("the graph cannot read a state, returning it as it is stored: %r", error)
        return as_stored(graph, stored)


def as_stored(graph: Graph, stored: CheckpointTuple) -> StateSnapshot:
    """Return a checkpoint's values as they are stored, without next nodes and tasks. None of the
    graph's own code is executed."""
    channels = stored.checkpoint["channel_values"]
    shown = graph.stream_channels_asis
    return StateSnapshot(
        values=channels.get(shown)
        if isinstance(shown, str)
        else {name: channels[name] for name in shown if name in channels},
        next=(),
        config=stored.config,
        metadata=stored.metadata,
        created_at=stored.checkpoint["ts"],
        parent_config=stored.parent_config,
        tasks=(),
        interrupts=(),
    )


def read_state(
    graph: Graph,
    saver: ThreadSaver,
    config: dict[str, Any],
    *,
    subgraphs: bool,
    redact_errors: bool,
) -> dict[str, Any]:
    """Read one state, in the form that `state_of` returns. Raise LargeState if it is too large."""
    snapshot = read_snapshot(graph, saver, config, subgraphs=subgraphs)
    return state_of(snapshot, redact_errors=redact_errors)


class HistoryOptions(TypedDict):
    """The states of a history to read. `turn` is held while a state is encoded."""

    limit: int
    before: dict[str, Any] | None
    metadata: dict[str, Any] | None
    fields: Sequence[str] | None
    most_bytes: int
    redact_errors: bool
    turn: AbstractContextManager[object]


def read_history(
    graph: Graph, saver: ThreadSaver, config: dict[str, Any], **options: Unpack[HistoryOptions]
) -> bytes:
    """Read states, newest first, and return a JSON list of their `fields`.

    Raise LargeState for a state that is too large, TooMuch for a list of more than `most_bytes`.
    """
    graph = bound(graph, saver)
    try:
        return _read_history(graph.get_state_history, config, **options)
    except _OURS:
        raise
    except BaseException as error:
        if not is_of_project(error):
            raise
        log.debug("the graph cannot read a history, reading one state at a time: %r", error)

    def one_by_one(config: Any, **page: Any) -> Iterator[StateSnapshot]:
        stored = list(saver.list(config, **page))  # while it is read, the saver is locked
        return (read_snapshot(graph, saver, dict(one.config)) for one in stored)

    return _read_history(one_by_one, config, **options)


def _read_history(
    history: Callable[..., Iterator[StateSnapshot]],
    config: dict[str, Any],
    **options: Unpack[HistoryOptions],
) -> bytes:
    """Read the states of a history.

    How many are read at a time depends on the size of those already read. Encoding a large state
    blocks the process. So it is done while holding `turn`, one state at a time in a process, and
    other requests are served in between.
    """
    limit, before, turn = options["limit"], options["before"], options["turn"]
    found: list[bytes] = []
    size = largest = 0
    at_once = 1
    while len(found) < limit:
        at_once = min(at_once, limit - len(found))
        snapshots = history(config, filter=options["metadata"], before=before, limit=at_once)
        # This waits for Postgres, so it does not hold `turn`.
        try:
            snapshot = next(snapshots, None)
        except LargeState:
            if at_once == 1:
                raise
            at_once = 1  # they are larger than those before; each alone may be read
            continue
        read = 0
        while snapshot is not None:
            before = dict(snapshot.config)
            read += 1
            with turn:
                state = state_of(snapshot, redact_errors=options["redact_errors"])
                encoded = to_json(selected(state, options["fields"]))
                size, largest = size + len(encoded), max(largest, len(encoded))
                found.append(encoded)
                if size > options["most_bytes"]:
                    raise TooMuch(options["most_bytes"])
                snapshot = next(snapshots, None)
            wait_for_turn()
        if read < at_once:
            break
        at_once = max(1, min(_MOST_AT_ONCE, _BYTES_AT_ONCE // largest))
    return b"[" + b",".join(found) + b"]"


def selected(state: dict[str, Any], fields: Sequence[str] | None) -> dict[str, Any]:
    """Return the named fields of a state. `values.<key>` names one of its values."""
    if not fields:
        return state
    chosen = {name: state[name] for name in fields if name in state}
    keys = [name.removeprefix("values.") for name in fields if name.startswith("values.")]
    values = state["values"]
    if keys and "values" not in chosen:
        chosen["values"] = {key: values[key] for key in keys if key in values}
    return chosen


def write_state(
    graph: Graph,
    saver: ThreadSaver,
    config: dict[str, Any],
    supersteps: Sequence[Sequence[StateUpdate]],
) -> dict[str, Any]:
    """Write states as if nodes had written them. Return the last checkpoint's configurable.

    Raise StateRefused for any exception that the graph's own code, such as a reducer, raises on the
    values. Raise LargeState if a state is too large.
    """
    try:
        saved = bound(graph, saver).bulk_update_state(config, supersteps)  # type: ignore[arg-type]
    except (Unavailable, StateUnreadable, psycopg.Error, LargeState, MemoryError):
        raise
    except InvalidUpdateError as error:
        raise StateRefused(str(error)) from error
    except BaseException as error:
        if not is_of_project(error):
            raise
        raise StateRefused(f"{type(error).__name__}: {error}") from error
    return dict(saved["configurable"])


def state_update(update: dict[str, Any]) -> StateUpdate:
    """Return the update of a node: the `command` that it returned, or its `values`."""
    if update.get("command") is not None:
        return StateUpdate(to_command(update["command"]), update.get("as_node"))  # type: ignore[arg-type]
    return StateUpdate(update.get("values"), update.get("as_node"))


def read_resting(graph: Graph, snapshot: StateSnapshot) -> Resting:
    """Return the output values, the interrupts by task, and whether a node is left to run."""
    return Resting(
        values=to_plain(output_values(graph, snapshot.values)),
        interrupts=interrupts_by_task(snapshot.tasks),
        has_next=bool(snapshot.next),
    )


def output_values(graph: Graph, values: Any) -> Any:
    """Return those of a state's values that are in the graph's output schema."""
    keys = graph.output_channels
    if isinstance(values, dict) and not isinstance(keys, str):
        return {key: values[key] for key in keys if key in values}
    return values


def interrupts_by_task(tasks: Sequence[PregelTask]) -> dict[str, list[dict[str, Any]]]:
    """Return the pending interrupts by task id."""
    return {
        task.id: [stored_interrupt(i) for i in task.interrupts]
        for task in tasks
        if task.interrupts and task.result is None
    }


def stored_interrupt(interrupt: Any) -> dict[str, Any]:
    """Return an interrupt in its form in states and on threads."""
    return {"id": interrupt.id, "value": to_plain(interrupt.value)}


def streamed_interrupt(interrupt: Any) -> dict[str, Any]:
    """Return an interrupt in its form in streams and in the response of `wait`."""
    return {"value": to_plain(interrupt.value), "id": interrupt.id, "response_schema": None}


def state_of(snapshot: StateSnapshot, *, redact_errors: bool) -> dict[str, Any]:
    """Return a snapshot as the API's ThreadState, for `to_json`: its values are already encoded.

    With `redact_errors`, REDACTED replaces the exceptions that ended its tasks.
    """
    checkpoint = checkpoint_address(snapshot.config)
    parent = checkpoint_address(snapshot.parent_config)
    if snapshot.metadata is None and snapshot.created_at is None:
        checkpoint_id = (snapshot.config or {}).get("configurable", {}).get("checkpoint_id")
        empty = copy.deepcopy(EMPTY_STATE)
        if checkpoint_id:
            empty |= {"checkpoint": checkpoint, "checkpoint_id": checkpoint_id}
        return empty
    return {
        "values": _encoded(snapshot.values),
        "next": list(snapshot.next),
        "tasks": [_task(task, redact_errors=redact_errors) for task in snapshot.tasks],
        "metadata": to_plain(snapshot.metadata),
        "created_at": snapshot.created_at,
        "checkpoint": checkpoint,
        "parent_checkpoint": parent,
        "interrupts": [stored_interrupt(i) for i in snapshot.interrupts],
        "checkpoint_id": checkpoint and checkpoint["checkpoint_id"],
        "parent_checkpoint_id": parent and parent["checkpoint_id"],
    }


def _encoded(values: Any) -> Any:
    """Encode each of a state's values once; they may be large."""
    if isinstance(values, dict) and all(isinstance(key, str) for key in values):
        return {key: orjson.Fragment(to_json(value)) for key, value in values.items()}
    return to_plain(values)


def checkpoint_address(config: Any) -> dict[str, Any] | None:
    """Return the address of a checkpoint, from its config. None without a config."""
    if not config:
        return None
    configurable = config["configurable"]
    checkpoint = {
        "checkpoint_id": configurable.get("checkpoint_id"),
        "thread_id": configurable.get("thread_id"),
        "checkpoint_ns": configurable.get("checkpoint_ns", ""),
    }
    if "checkpoint_map" in configurable:
        checkpoint["checkpoint_map"] = configurable["checkpoint_map"]
    return checkpoint


def _task(task: PregelTask, *, redact_errors: bool) -> dict[str, Any]:
    state: dict[str, Any] | None = None
    checkpoint: dict[str, Any] | None = None
    if isinstance(task.state, StateSnapshot):
        state = state_of(task.state, redact_errors=redact_errors)
    elif task.state:
        configurable = task.state["configurable"]
        checkpoint = {
            "thread_id": configurable.get("thread_id"),
            "checkpoint_ns": configurable.get("checkpoint_ns", ""),
        }
    return {
        "id": task.id,
        "name": task.name,
        "path": to_plain(task.path),
        "error": _error_of(task, redact=redact_errors),
        "interrupts": [stored_interrupt(i) for i in task.interrupts],
        "checkpoint": checkpoint,
        "state": state,
        "result": to_plain(task.result),
    }


def _error_of(task: PregelTask, *, redact: bool) -> str | None:
    """Return the repr of the exception that ended a task, or REDACTED; None without one.

    Read from a checkpoint, it is already the repr.
    """
    if task.error is None or not redact:
        return task.error if isinstance(task.error, str | None) else repr(task.error)
    return REDACTED
