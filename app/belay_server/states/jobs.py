"""Jobs on the states of threads. A web process does them itself or in a state process.

Each job takes a StateParts and values that can be pickled, and returns such a value.
`process.StateProcess.run` calls it. Reading a state that is larger than the limits of the parts
raises LargeState before anything has been written.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import orjson
import tenacity
from langgraph_sdk.runtime import AccessContext

from belay_server.configuration.settings import Settings
from belay_server.db import runs as run_rows
from belay_server.db import threads as thread_rows
from belay_server.db.postgres.connection import Connection
from belay_server.db.postgres.pool import Database
from belay_server.domain.agent_runs.output_schemas import (
    check_output_schema,
    refuse_slow_schema,
)
from belay_server.domain.agent_runs.outputs import output_of
from belay_server.domain.errors import BadRequest, Conflict, NotFound, TooMuch
from belay_server.domain.json_paths import extract
from belay_server.graphs import thread_state
from belay_server.graphs.checkpoints.own_checkpointer import OwnCheckpointer
from belay_server.graphs.checkpoints.thread_saver import ThreadSaver, UpdateSaver
from belay_server.graphs.project.factories import GraphUse
from belay_server.graphs.protocol.events import INTERRUPT
from belay_server.graphs.registry import Graph, GraphRegistry
from belay_server.graphs.serde import to_json
from belay_server.graphs.store import factory_store
from belay_server.states.memory import limited_memory

log = logging.getLogger(__name__)

#: An update is computed again if another request has changed the state meanwhile.
_AGAIN = tenacity.Retrying(
    retry=tenacity.retry_if_result(lambda saved: saved is None),
    wait=tenacity.wait_random(0, 0.1),
    stop=tenacity.stop_after_attempt(30),
    retry_error_callback=lambda _state: None,
)
#: The memory that compiling an output schema may need, in bytes.
_SCHEMA_BYTES = 256 * 1024 * 1024
#: Parts of a large document are decoded up to this size, in bytes.
_SMALL = 16 * 1024


@dataclass(frozen=True, slots=True)
class StateParts:
    """The objects and limits that reading and writing states needs."""

    settings: Settings
    graphs: GraphRegistry
    database: Database
    #: Limit for one read of states, in stored bytes.
    most_bytes: int
    #: Limit for all writes to a delta channel, in bytes. None means no limit.
    most_written_bytes: int | None = None
    #: Limit for one read of states, in pending tasks and writes of tasks. None means no limit.
    most_tasks: int | None = None
    #: The project's own, which has the values of states; None without one.
    checkpointer: OwnCheckpointer | None = None
    #: Held while decoding a state that is not small.
    turn: AbstractContextManager[object] = field(default_factory=nullcontext)

    def saver(self, *, is_limited: bool = True, **limits: Any) -> ThreadSaver:
        """Return a saver for one job, without limits for reading or with them. `limits` are
        further ones of `ThreadSaver`."""
        limits |= self._limits if is_limited else {}
        return ThreadSaver(self.database.pool, **self._options, **limits)

    def update_saver(self) -> UpdateSaver:
        """Return a saver for one update."""
        return UpdateSaver(self.database.pool, **self._options, **self._limits)

    @property
    def _options(self) -> dict[str, Any]:
        return {
            "aes_key": self.settings.aes_key,
            "checkpointer": self.checkpointer,
            "turn": self.turn,
        }

    @property
    def _limits(self) -> dict[str, Any]:
        return {
            "most_bytes": self.most_bytes,
            "most_written_bytes": self.most_written_bytes,
            "most_tasks": self.most_tasks,
        }


@dataclass(frozen=True, slots=True)
class ThreadGraph:
    """A thread, and the graph that its states are read with."""

    thread_id: UUID
    graph_id: str
    config: dict[str, Any]
    #: The user who reads or writes the states, for a factory.
    user: Mapping[str, Any] | None = field(default=None, repr=False)

    def load(
        self,
        parts: StateParts,
        checkpoint_id: str | None = None,
        *,
        access: AccessContext = "threads.read",
    ) -> Graph:
        """Return the graph. A factory gets the config of the thread's last run.

        Raise ProjectError if the project does not have it, StateUnreadable if its factory fails.
        """
        where = thread_state.thread_config(str(self.thread_id), {"checkpoint_id": checkpoint_id})
        configurable = {**(self.config.get("configurable") or {}), **where["configurable"]}
        with _graph_code(parts):
            return parts.graphs.read(
                self.graph_id,
                GraphUse(
                    access,
                    {**self.config, "configurable": configurable},
                    store=lambda: factory_store(parts.settings, parts.graphs),
                    user=self.user,
                ),
            )


def _graph_code(parts: StateParts) -> AbstractContextManager[None]:
    return thread_state.graph_code(redact_errors=parts.settings.redact_errors)


@contextmanager
def _checkpoint_of_client() -> Iterator[None]:
    """Raise BadRequest for a ValueError: LangGraph raises it for an invalid checkpoint."""
    try:
        yield
    except orjson.JSONDecodeError:
        raise  # out of memory, while a state is decoded
    except ValueError as error:
        raise BadRequest(str(error)) from error


def read_state(
    parts: StateParts,
    thread: ThreadGraph,
    checkpoint: dict[str, Any] | None,
    fields: list[str] | None,
    *,
    subgraphs: bool,
) -> bytes:
    """Return the JSON of a state's fields: of the newest one, or the one at `checkpoint`.

    Raise NotFound for a checkpoint that the thread does not have, BadRequest for an invalid one,
    TooMuch for a large response, StateUnreadable if the graph's own code fails.
    """
    with _graph_code(parts), _checkpoint_of_client():
        state = thread_state.read_state(
            thread.load(parts),
            parts.saver(),
            thread_state.thread_config(str(thread.thread_id), checkpoint),
            subgraphs=subgraphs,
            redact_errors=parts.settings.redact_errors,
        )
    checkpoint_id = (checkpoint or {}).get("checkpoint_id")
    if checkpoint_id and state["created_at"] is None:
        raise NotFound(f"Checkpoint {checkpoint_id} not found")
    encoded = to_json(thread_state.selected(state, fields))
    if len(encoded) > parts.settings.max_answer_bytes:
        raise TooMuch(parts.settings.max_answer_bytes)
    return encoded


@dataclass(frozen=True, slots=True)
class HistoryPage:
    """The states of a thread's history to read. `before` is a checkpoint id."""

    limit: int
    before: str | None
    metadata: dict[str, Any] | None
    checkpoint_ns: str | None
    fields: list[str] | None


def read_history(parts: StateParts, thread: ThreadGraph, page: HistoryPage) -> bytes:
    """Return a JSON list of states, newest first. Raise BadRequest, TooMuch for a large one,
    StateUnreadable."""
    thread_id = str(thread.thread_id)
    before = None
    if page.before is not None:
        before = thread_state.thread_config(thread_id, {"checkpoint_id": page.before})
    with _graph_code(parts), _checkpoint_of_client():
        return thread_state.read_history(
            thread.load(parts),
            parts.saver(),
            thread_state.thread_config(thread_id, {"checkpoint_ns": page.checkpoint_ns}),
            limit=page.limit,
            before=before,
            metadata=page.metadata,
            fields=page.fields,
            most_bytes=parts.settings.max_answer_bytes,
            redact_errors=parts.settings.redact_errors,
            turn=parts.turn,
        )


@dataclass(frozen=True, slots=True)
class WrittenState:
    """The address of a state that was written, and the JSON of all of it. None if it has become too
    large to be read."""

    configurable: dict[str, Any]
    state: bytes | None


def update_state(
    parts: StateParts, thread: ThreadGraph, checkpoint: dict[str, Any], body: dict[str, Any]
) -> WrittenState:
    """Write a state as a node would, and set the thread's row to it.

    It is computed without holding a lock, and again if the thread has a newer state meanwhile.
    Raise NotFound without the thread or the checkpoint, BadRequest if the graph does not accept the
    values, Conflict while runs are in flight or if other requests keep changing the state. Then
    nothing is written.
    """
    graph = thread.load(parts, access="threads.update")
    saved = _AGAIN(_try_update, parts, graph, thread.thread_id, checkpoint, body)
    if saved is None:
        raise Conflict(
            f"Other requests keep changing the state of thread {thread.thread_id}. Try again."
        )
    # The written state is read without a limit on its size.
    saver = parts.saver(is_limited=False)
    try:
        _rest(parts, graph, saver, thread.thread_id, keep_error=False)
        state = thread_state.read_state(
            graph,
            saver,
            {"configurable": dict(saved)},
            subgraphs=False,
            redact_errors=parts.settings.redact_errors,
        )
        return WrittenState(saved, to_json(state))
    except MemoryError:
        log.warning(
            "a state of thread %s was written but is too large to be read, leaving it out",
            thread.thread_id,
        )
        return WrittenState(saved, None)


def _try_update(
    parts: StateParts,
    graph: Graph,
    thread_id: UUID,
    checkpoint: dict[str, Any],
    body: dict[str, Any],
) -> dict[str, Any] | None:
    """Return the address of the new state. Write nothing and return None if the thread has got
    another one since this one was computed."""
    saver = parts.update_saver()
    config = thread_state.thread_config(str(thread_id), checkpoint)
    namespace = config["configurable"]["checkpoint_ns"]
    with parts.database.connection() as conn:
        newest = thread_rows.newest_checkpoints(conn, thread_id, namespace)
    if checkpoint.get("checkpoint_id") and saver.get_tuple(config) is None:
        raise NotFound(f"Checkpoint {checkpoint['checkpoint_id']} not found")
    try:
        saved = thread_state.write_state(graph, saver, config, [[thread_state.state_update(body)]])
    except thread_state.StateRefused as error:
        raise BadRequest(str(error)) from error

    def store(conn: Connection) -> bool:
        if not thread_rows.lock_thread(conn, thread_id):
            raise NotFound(f"Thread with ID {thread_id} not found")
        if run_rows.thread_is_busy(conn, thread_id):
            raise Conflict(f"Thread {thread_id} has in-flight runs. Wait for them or cancel them.")
        if thread_rows.newest_checkpoints(conn, thread_id, namespace) != newest:
            return False
        saver.store(conn)
        # A reader of the thread sets its row if this process has not done so yet, or has crashed.
        thread_rows.forget_values(conn, thread_id)
        return True

    return saved if parts.database.transaction(store) else None


def rest(parts: StateParts, thread: ThreadGraph, *, keep_error: bool) -> None:
    """Set the thread's row to its newest checkpoint. Raise StateUnreadable."""
    graph = thread.load(parts)
    with _graph_code(parts):
        _rest(parts, graph, parts.saver(), thread.thread_id, keep_error=keep_error)


def rest_unread(parts: StateParts, thread_id: UUID, *, keep_error: bool) -> None:
    """Set the thread's row to a newest checkpoint that cannot be read: the row has no values."""
    with parts.database.connection() as conn:
        thread_rows.rest_thread(
            conn,
            thread_id,
            values=None,
            interrupts={},
            resting_status=None,
            keep_error=keep_error,
            newest=None,
        )


def _rest(
    parts: StateParts, graph: Graph, saver: ThreadSaver, thread_id: UUID, *, keep_error: bool
) -> None:
    config = thread_state.thread_config(str(thread_id))
    snapshot = thread_state.read_snapshot(graph, saver, config)
    # Values that are too large for the row are not decoded: that takes several times their size.
    values = to_json(thread_state.output_values(graph, snapshot.values))
    interrupts = thread_state.interrupts_by_task(snapshot.tasks)
    most, size = parts.settings.max_outcome_bytes, len(to_json(interrupts))
    too_large = len(values) + size > most
    with parts.database.connection() as conn:
        thread_rows.rest_thread(
            conn,
            thread_id,
            values=None if too_large else orjson.loads(values),
            interrupts=interrupts if size <= most else {},
            resting_status=thread_state.resting_status(snapshot.next, interrupts),
            keep_error=keep_error,
            newest=snapshot.config["configurable"].get("checkpoint_id"),
        )


def read_values(parts: StateParts, thread: ThreadGraph, checkpoint_id: str) -> bytes:
    """Return the JSON of the output values at a checkpoint. Raise ProjectError, TooMuch,
    StateUnreadable."""
    where = thread_state.thread_config(str(thread.thread_id), {"checkpoint_id": checkpoint_id})
    graph = thread.load(parts, checkpoint_id)
    with _graph_code(parts):
        snapshot = thread_state.read_snapshot(graph, parts.saver(), where)
    values = to_json(thread_state.output_values(graph, snapshot.values))
    if len(values) > parts.settings.max_answer_bytes:
        raise TooMuch(parts.settings.max_answer_bytes)
    return values


@dataclass(frozen=True, slots=True)
class Encoded:
    """JSON that is not decoded. It becomes an `orjson.Fragment`, which cannot be pickled."""

    document: bytes


def check_schema(_parts: StateParts, schema: dict[str, Any]) -> None:
    """Raise InvalidOutputSchema if an output schema is invalid. End the process if it needs more
    memory than a schema may."""
    began = time.process_time()
    with limited_memory(_SCHEMA_BYTES):
        for _ in check_output_schema(schema):
            pass
    refuse_slow_schema(schema, time.process_time() - began)


def agent_output(_parts: StateParts, values: bytes, *, structured: bool) -> bytes:
    """Return the output of an agent run as JSON in ASCII, from the values its graph returned."""
    output = output_of(orjson.loads(values), structured=structured)
    return json.dumps(output, ensure_ascii=True, separators=(",", ":")).encode("ascii")


def extracts(
    _parts: StateParts, documents: dict[str, Any], encoded: dict[str, str], paths: dict[str, str]
) -> dict[str, Any]:
    """Return the values at paths in documents, of which `encoded` ones are JSON. A large value
    stays JSON."""
    whole = documents | {name: orjson.loads(document) for name, document in encoded.items()}
    return {name: _split(extract(whole, path), levels=0) for name, path in paths.items()}


def encode_again(_parts: StateParts, document: bytes) -> bytes:
    """Return a JSON document with its numbers in the form that this server writes."""
    return to_json(orjson.loads(document))


def split(_parts: StateParts, document: bytes) -> Any:
    """Decode the data of a large event. Large values below its third level stay JSON, and so do
    large lists, except the list of a run's interrupts."""
    data = orjson.loads(document)
    interrupts = data.pop(INTERRUPT, None) if isinstance(data, dict) else None
    parts = _split(data, levels=3)
    if interrupts is not None:
        parts[INTERRUPT] = [_split(one, levels=1) for one in interrupts]
    return parts


def _split(value: Any, *, levels: int) -> Any:
    encoded = orjson.dumps(value)
    if len(encoded) <= _SMALL:
        return value
    if levels and isinstance(value, dict):
        return {key: _split(one, levels=levels - 1) for key, one in value.items()}
    return value if isinstance(value, str) else Encoded(encoded)


def with_fragments(value: Any) -> Any:
    """Return a result of `split` with each Encoded as a fragment for `to_json`."""
    if isinstance(value, dict):
        return {key: with_fragments(one) for key, one in value.items()}
    if isinstance(value, list):
        return [with_fragments(one) for one in value]
    return orjson.Fragment(value.document) if isinstance(value, Encoded) else value
