"""Execute a graph, and translate its stream into the events of the run and its ending.

This module does not use Postgres, Redis or Celery. `execute` gets a graph, a saver and an `emit`,
calls `emit(name, data)` for each event and returns the Ending. It is stopped by cancelling it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from langchain_core.messages import (
    AIMessageChunk,
    BaseMessage,
    BaseMessageChunk,
    message_chunk_to_message,
)
from langchain_core.tracers import LangChainTracer
from langgraph._internal._config import DEFAULT_RECURSION_LIMIT
from langgraph.errors import NodeCancelledError
from langgraph.pregel import Pregel
from langsmith.utils import tracing_is_enabled

from belay_server.domain.access import AUTH_USER, public_config
from belay_server.domain.run_options import LANGSMITH_EXAMPLE, LANGSMITH_PROJECT, RunKwargs
from belay_server.domain.runs import Ending, RunStatus
from belay_server.graphs.checkpoints.run_saver import CheckpointsUnavailable, ClaimLost, RunSaver
from belay_server.graphs.commands import to_command
from belay_server.graphs.contexts import fitted
from belay_server.graphs.project.user import ProjectUser
from belay_server.graphs.protocol.events import INTERRUPT
from belay_server.graphs.registry import Graph
from belay_server.graphs.serde import to_json, to_plain
from belay_server.graphs.store import GraphStore
from belay_server.graphs.thread_state import (
    REDACTED,
    bound,
    checkpoint_address,
    output_values,
    read_resting,
    streamed_interrupt,
)

log = logging.getLogger(__name__)

Emit = Callable[[str, bytes], None]

#: The stream modes of the API, and the modes of LangGraph that they are made from.
_LANGGRAPH_MODES = {
    "values": "values",
    "updates": "updates",
    "custom": "custom",
    "messages": "messages",
    "messages-tuple": "messages",
    "debug": "debug",
    "tasks": "tasks",
    "checkpoints": "checkpoints",
    "tools": "tools",
}
#: LangGraph's key that refuses to resume an interrupt which is not pending.
_STRICT_RESUME = "__pregel_strict_resume"
#: The mode that is made from LangChain's events; all other modes are streamed within it.
_EVENTS = "events"
#: Modes without the checkpoints of a stateless run, whose thread clients cannot read.
_CHECKPOINT_MODES = ("checkpoints", "debug")


@dataclass(frozen=True, slots=True)
class Execution:
    """The graph of an attempt, ready to be executed."""

    graph: Graph
    saver: RunSaver
    store: GraphStore
    kwargs: RunKwargs
    #: Whether to resume from the checkpoint of an earlier attempt of this run.
    resumes: bool
    attempt: int
    redact_errors: bool
    #: Whether the attempt may end without an ending if a node is cancelled, but not by a stop.
    may_be_cut_off: Callable[[], bool] = lambda: False
    #: Events of earlier attempts, for a run whose stream can be resumed.
    sent_before: frozenset[tuple[str, bytes]] = frozenset()

    @property
    def config(self) -> dict[str, Any]:
        config = dict(self.kwargs.config)
        configurable = dict(self.kwargs.configurable)
        if self.resumes:
            for key in ("checkpoint_id", "checkpoint_map", "checkpoint_ns"):
                configurable.pop(key, None)
        if (user := configurable.get(AUTH_USER)) is not None:
            configurable[AUTH_USER] = ProjectUser(user)
        if self.kwargs.strict_resume:
            configurable[_STRICT_RESUME] = True
        config["configurable"] = configurable
        if (tracer := _tracer(configurable)) is not None:
            config["callbacks"] = [tracer]
        config.setdefault("run_name", configurable["graph_id"])
        config["metadata"] = {**config.get("metadata", {}), "run_attempt": self.attempt}
        return config

    @property
    def thread_config(self) -> dict[str, Any]:
        thread_id = self.kwargs.configurable["thread_id"]
        return {"configurable": {"thread_id": thread_id, "checkpoint_ns": ""}}

    @property
    def input(self) -> Any:
        if self.resumes:
            return None
        command = self.kwargs.command
        return self.kwargs.input if command is None else to_command(command)

    @property
    def context(self) -> dict[str, Any] | None:
        """Return the context for graphs that declare one; others read it from `configurable`."""
        return fitted(self.kwargs.context, self.graph.context_schema)


def _tracer(configurable: Mapping[str, Any]) -> LangChainTracer | None:
    """Return a tracer for the LangSmith project that the run names. Without one, or without
    tracing, return None: LangChain then uses the environment's project if tracing is on."""
    project = configurable.get(LANGSMITH_PROJECT)
    example = configurable.get(LANGSMITH_EXAMPLE)
    if (project is None and example is None) or not tracing_is_enabled():
        return None
    return LangChainTracer(project_name=project, example_id=example)


@dataclass(slots=True)
class _Stream:
    """The state of translating a graph's stream."""

    emit: Emit
    modes: tuple[str, ...]
    graph: Graph
    values: Any = None
    saw_values: bool = False
    interrupted: bool = False
    messages: dict[str, BaseMessageChunk] = field(default_factory=dict)
    #: Whether the thread is deleted with the run.
    temporary: bool = False
    #: The events that an earlier attempt has emitted already, as (name, data).
    sent_before: frozenset[tuple[str, bytes]] = frozenset()
    redact_errors: bool = False
    has_values: set[str] = field(default_factory=set)

    def take(self, namespace: tuple[str, ...], mode: str, data: Any) -> None:
        if mode == "messages":
            self._take_message(namespace, data)
            return
        if isinstance(data, dict) and INTERRUPT in data:
            self.interrupted = True
        if mode == "values":
            data = self._output(namespace, data)
        elif mode == "updates" and isinstance(data, dict) and INTERRUPT in data:
            data = {**data, INTERRUPT: [streamed_interrupt(i) for i in data[INTERRUPT]]}
        elif mode in _CHECKPOINT_MODES:
            if self.temporary and _is_checkpoint(mode, data):
                return
            if mode == "debug":
                data = _with_addresses(data)
            if _is_checkpoint(mode, data):
                data = _with_public_configs(mode, data)
        if self.redact_errors:
            data = _without_errors(mode, data)
        if mode in self.modes:
            name, encoded = _event_name(mode, namespace), to_json(data)
            if not self._was_said(mode, name, data, encoded):
                self.emit(name, encoded)

    def _was_said(self, mode: str, name: str, data: Any, encoded: bytes) -> bool:
        """Return whether an earlier attempt has emitted this event.

        A run that resumes after its worker was lost first streams its present state: the values so
        far, and the updates of tasks whose step had not ended.
        """
        if not self.sent_before:
            return False
        if mode == "values":
            first = name not in self.has_values
            self.has_values.add(name)
            return first and (name, encoded) in self.sent_before
        if mode != "updates":
            return False
        if not isinstance(data, dict) or not data.get("__metadata__", {}).get("cached"):
            self.sent_before = frozenset()  # from here on, all events are new
            return False
        update = {key: value for key, value in data.items() if key != "__metadata__"}
        return (name, to_json(update)) in self.sent_before

    def take_event(self, event: Mapping[str, Any]) -> None:
        """Emit one of LangChain's events."""
        if self.redact_errors and "error" in event["data"]:
            event = {**event, "data": {**event["data"], "error": REDACTED}}
        self.emit(_EVENTS, to_json(event))

    def _output(self, namespace: tuple[str, ...], data: Any) -> Any:
        """Return values as clients get them: those of a root graph by its output schema."""
        if namespace:
            return _with_interrupts(data, data)
        output = output_values(self.graph, data)
        self.values, self.saw_values = output, True
        return _with_interrupts(output, data)

    def _take_message(self, namespace: tuple[str, ...], data: Any) -> None:
        message, metadata = data
        if "messages-tuple" in self.modes:
            self.emit(_event_name("messages", namespace), to_json([message, metadata]))
        if "messages" in self.modes:
            self._emit_accumulated(namespace, message, metadata)

    def _emit_accumulated(
        self, namespace: tuple[str, ...], message: BaseMessage, metadata: dict[str, Any]
    ) -> None:
        """Emit `messages/partial` with the message so far, or `messages/complete`."""
        message_id = message.id or ""
        seen = self.messages.get(message_id)
        if seen is None:
            described = to_json({message_id: {"metadata": metadata}})
            self.emit(_event_name("messages/metadata", namespace), described)
        if not isinstance(message, BaseMessageChunk):
            self.emit(_event_name("messages/complete", namespace), to_json([message]))
            return
        whole = message if seen is None else seen + message
        assert isinstance(whole, BaseMessageChunk)
        self.messages[message_id] = whole
        shown = message_chunk_to_message(whole) if isinstance(whole, AIMessageChunk) else whole
        self.emit(_event_name("messages/partial", namespace), to_json([shown]))


def _is_checkpoint(mode: str, data: Any) -> bool:
    return mode == "checkpoints" or data["type"] == "checkpoint"


def _with_public_configs(mode: str, data: dict[str, Any]) -> dict[str, Any]:
    """Return a checkpoint whose configs have neither credentials nor the user's own fields."""
    payload = data["payload"] if mode == "debug" else data
    configs = {
        name: public_config(payload[name])
        for name in ("config", "parent_config")
        if payload.get(name) is not None
    }
    shown = {**payload, **configs}
    return {**data, "payload": shown} if mode == "debug" else shown


def _without_errors(mode: str, data: Any) -> Any:
    """Redact the error messages of tasks in a stream of tasks or checkpoints."""
    if mode == "debug":
        return {**data, "payload": _redacted(data["payload"])}
    return _redacted(data) if mode in ("tasks", "checkpoints") else data


def _redacted(payload: dict[str, Any]) -> dict[str, Any]:
    if payload.get("error") is not None:
        payload = {**payload, "error": REDACTED}
    if payload.get("tasks"):
        payload = {**payload, "tasks": [_redacted(task) for task in payload["tasks"]]}
    return payload


def _with_addresses(data: dict[str, Any]) -> dict[str, Any]:
    """Return a debug event with the addresses of checkpoints in the API's form."""
    payload = data["payload"]
    if data["type"] != "checkpoint":
        return data
    tasks = [_with_address(task) for task in payload["tasks"]]
    addresses = {
        "checkpoint": checkpoint_address(payload["config"]),
        "parent_checkpoint": checkpoint_address(payload["parent_config"]),
    }
    return {**data, "payload": {**payload, "tasks": tasks, **addresses}}


def _with_address(task: dict[str, Any]) -> dict[str, Any]:
    """Return a task; one that is a subgraph gets the address of the subgraph's checkpoints."""
    state = task.get("state")
    if not isinstance(state, dict) or "configurable" not in state:
        return task
    rest = {key: value for key, value in task.items() if key != "state"}
    return {**rest, "checkpoint": dict(state["configurable"])}


def _with_interrupts(shown: Any, data: Any) -> Any:
    if isinstance(data, dict) and INTERRUPT in data:
        interrupts = [streamed_interrupt(i) for i in data[INTERRUPT]]
        return {**shown, INTERRUPT: interrupts}
    return shown


def _event_name(mode: str, namespace: tuple[str, ...]) -> str:
    """Return the name of an event as one line, also for nodes with line breaks in their names."""
    return " ".join("|".join([mode, *namespace]).splitlines())


async def execute(execution: Execution, emit: Emit) -> Ending:
    """Execute the graph to its end. Raises asyncio.CancelledError when it is stopped, ClaimLost and
    CheckpointsUnavailable when the attempt has to end without an ending."""
    graph = bound(execution.graph, execution.saver, execution.store)
    # Else the event of a step's only task may be delivered after its checkpoint is stored.
    graph.stream_eager = graph.stream_eager or execution.kwargs.resumable
    modes = tuple(execution.kwargs.stream_mode)
    stream = _Stream(
        emit,
        modes,
        graph,
        temporary=execution.kwargs.temporary,
        sent_before=execution.sent_before,
        redact_errors=execution.redact_errors,
    )
    wanted = ["values", *(_LANGGRAPH_MODES[mode] for mode in modes if mode != _EVENTS)]
    try:
        if _EVENTS in modes:
            await _stream_events(graph, execution, stream, wanted)
        else:
            await _stream(graph, execution, stream, wanted)
        await execution.saver.flush()
    except (ClaimLost, CheckpointsUnavailable):
        raise
    except Exception as error:
        if isinstance(error, NodeCancelledError) and execution.may_be_cut_off():
            raise asyncio.CancelledError from error
        log.warning("a graph raised an exception, which ends its run", exc_info=error)
        described = _describe(error, redact=execution.redact_errors)
        emit("error", to_json(described))
        return await _failed(graph, execution, described)
    return await _finished(graph, execution, stream)


def _options(execution: Execution, modes: Sequence[str]) -> dict[str, Any]:
    kwargs = execution.kwargs
    return {
        "context": execution.context,
        "stream_mode": list(dict.fromkeys(modes)),
        "interrupt_before": _nodes(kwargs.interrupt_before),
        "interrupt_after": _nodes(kwargs.interrupt_after),
        "durability": kwargs.durability,
        "subgraphs": kwargs.subgraphs,
    }


async def _stream(
    graph: Graph, execution: Execution, stream: _Stream, modes: Sequence[str]
) -> None:
    options = _options(execution, modes)
    parts = graph.astream(execution.input, execution.config, **options)  # type: ignore[call-overload]
    async for part in parts:
        _take_part(stream, execution, part)


async def _stream_events(
    graph: Graph, execution: Execution, stream: _Stream, modes: Sequence[str]
) -> None:
    """Stream the start and end of everything that runs, with the graph's own stream in between."""
    run_id = UUID(execution.kwargs.configurable["run_id"])
    # LangChain would limit the steps to 25, unlike LangGraph.
    limit = {"recursion_limit": DEFAULT_RECURSION_LIMIT}
    config = {**limit, **execution.config, "run_id": run_id}
    options = _options(execution, modes)
    said = graph.astream_events(execution.input, config, version="v2", **options)  # type: ignore[call-overload]
    async for event in said:
        if event["event"] == "on_chain_stream" and not event["parent_ids"]:
            _take_part(stream, execution, event["data"]["chunk"])
        else:
            stream.take_event(event)


def _take_part(stream: _Stream, execution: Execution, part: Any) -> None:
    namespace, mode, data = part if execution.kwargs.subgraphs else ((), *part)
    stream.take(namespace, mode, data)


def _nodes(names: Any) -> Any:
    return "*" if names in ("*", ["*"]) else names


async def _finished(graph: Graph, execution: Execution, stream: _Stream) -> Ending:
    """Return the ending of a graph that has ended by itself.

    Its last values are the outcome. The state is read only if the graph may have paused: reading
    costs a round trip and prepares the next tasks.
    """
    may_pause = (
        stream.interrupted
        or not stream.saw_values
        or execution.kwargs.may_pause
        or _may_pause(graph)
    )
    if not may_pause:
        return Ending(RunStatus.SUCCESS, values=to_plain(stream.values))
    resting = await read_now(graph, execution)
    return Ending(
        RunStatus.SUCCESS,
        values=resting.values,
        interrupts=resting.interrupts,
        has_next=resting.has_next,
    )


def _may_pause(graph: Graph) -> bool:
    """Return whether the graph or a subgraph was compiled with `interrupt_before` or `_after`."""
    subgraphs = (found for _, found in graph.get_subgraphs(recurse=True))
    return any(
        one.interrupt_before_nodes or one.interrupt_after_nodes
        for one in (graph, *subgraphs)
        if isinstance(one, Pregel)
    )


async def _failed(graph: Graph, execution: Execution, error: dict[str, str]) -> Ending:
    try:
        resting = await read_now(graph, execution)
    except (ClaimLost, CheckpointsUnavailable):
        raise
    except Exception:  # noqa: BLE001  (the graph's error takes precedence)
        return Ending(RunStatus.ERROR, values_known=False, has_next=True, error=error)
    return Ending(
        RunStatus.ERROR,
        values=resting.values,
        interrupts=resting.interrupts,
        has_next=resting.has_next,
        error=error,
    )


async def stopped(execution: Execution) -> Ending:
    """Return the ending of a run that was stopped, from its last checkpoint."""
    resting = await read_now(bound(execution.graph, execution.saver), execution)
    return Ending(
        RunStatus.INTERRUPTED,
        values=resting.values,
        interrupts=resting.interrupts,
        has_next=resting.has_next,
    )


async def read_now(graph: Graph, execution: Execution) -> Any:
    """Return the Resting of the thread's newest checkpoint. Raises ClaimLost,
    CheckpointsUnavailable, and the errors of the graph's own code."""
    snapshot = await graph.aget_state(execution.thread_config)  # type: ignore[arg-type]
    return read_resting(graph, snapshot)


def _describe(error: Exception, *, redact: bool) -> dict[str, str]:
    message = REDACTED if redact else shortened(message_of(error))
    return {"error": shortened(type(error).__name__), "message": message}


def message_of(error: BaseException) -> str:
    """Return the message of an exception of the project's code, even if it cannot be formatted."""
    try:
        return str(error)
    except Exception as failed:  # noqa: BLE001  (the project's own code)
        return f"(its message cannot be formatted: {type(failed).__name__})"


#: Characters of an error message that are stored in the row, the event and the webhook's payload.
_LONGEST_MESSAGE = 20_000


def shortened(message: str) -> str:
    """Return an error message as it is stored: without NUL characters and lone surrogates, which
    JSON in Postgres cannot have. The number of characters cut off is added."""
    over = len(message) - _LONGEST_MESSAGE
    stored = str(to_plain(message[:_LONGEST_MESSAGE]))
    return stored if over <= 0 else f"{stored}… ({over} characters cut off)"
