"""Read the outcome of a run for `join` and `wait`: the run's own end, whenever it is read."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from uuid import UUID

import orjson

from belay_server.db import run_cancels as cancel_rows
from belay_server.db import runs as run_rows
from belay_server.db.postgres.pool import Database
from belay_server.domain.access import AUTH_USER
from belay_server.domain.errors import InvalidRequest, StateUnreadable
from belay_server.domain.runs import ACTIVE, RunStatus
from belay_server.graphs.checkpoints.thread_saver import LargeState
from belay_server.graphs.project.loading import ProjectError
from belay_server.graphs.serde import to_json
from belay_server.services.parts import Parts
from belay_server.services.stored_json import as_json
from belay_server.states import jobs as state_jobs
from belay_server.states.jobs import ThreadGraph
from belay_server.states.process import StateProcess

log = logging.getLogger(__name__)

#: The outcome of a run that was deleted while a client waited for it.
_DELETED = {"error": "RunNotFound", "message": "404: Run not found"}
#: The highest ratio to which Postgres compresses JSON.
_COMPRESSION = 100


class NotEnded(Exception):
    """The run is pending or running."""


@dataclass(frozen=True, slots=True)
class End:
    """The end of a run, for a client that waits for it.

    `answer` is JSON: values, with `__interrupt__`, or `__error__`. None: the answer may have up to
    `most_bytes` bytes, and `large_answer` reads it.
    """

    answer: bytes | None
    most_bytes: int = 0


@dataclass(frozen=True, slots=True)
class _Checkpoint:
    """The checkpoint with the values of a run whose row has none, as it did not end by itself."""

    thread: ThreadGraph
    checkpoint_id: str


def end_of(parts: Parts, thread_id: UUID, run_id: UUID, caller: str | None) -> End:  # noqa: PLR0911
    """Return the end of a run, without reading a large answer. Raises NotEnded."""
    with parts.database.connection() as conn:
        run = run_rows.run_outcome(conn, thread_id, run_id)
        if run is None:
            reason = cancel_rows.rollback_reason(conn, run_id) or _DELETED
            return End(to_json({"__error__": reason}))
    if run.status in ACTIVE:
        raise NotEnded
    if run.status in (RunStatus.ERROR, RunStatus.TIMEOUT):
        return End(to_json({"__error__": run.error}))
    if run.answer is not None:
        return End(as_json(parts, run.answer, caller))
    most_bytes = parts.settings.max_answer_bytes
    if run.stored_bytes is not None:
        return End(None, min(run.stored_bytes * _COMPRESSION, most_bytes))
    found = _last_checkpoint(parts.database, thread_id, run_id)
    if found is None:
        return End(b"{}")
    try:
        return End(_kept(parts, run_id, _values(parts.states, found)))
    except LargeState:
        return End(None, most_bytes)


def large_answer(parts: Parts, thread_id: UUID, run_id: UUID, caller: str | None) -> bytes:
    """Return an answer that `end_of` has not read. For a state that is too large to read, the
    answer is an error. Raises TooMany, Unavailable."""
    with parts.database.connection() as conn:
        answer = run_rows.run_answer(conn, run_id)
    if answer is not None:
        return as_json(parts, answer, caller)
    found = _last_checkpoint(parts.database, thread_id, run_id)
    if found is None:
        return b"{}"
    try:
        values = parts.states.run_for(
            caller, state_jobs.read_values, found.thread, found.checkpoint_id
        )
    except InvalidRequest as error:
        said = {"error": type(error).__name__, "message": error.detail}
        return to_json({"__error__": said})
    except ProjectError as error:
        log.warning("cannot read the values of run %s, returning none: %s", run_id, error)
        return b"{}"
    return _kept(parts, run_id, values)


def _last_checkpoint(database: Database, thread_id: UUID, run_id: UUID) -> _Checkpoint | None:
    """Return the last checkpoint that the run itself has written; None if there is none."""
    with database.connection() as conn:
        run = run_rows.get_thread_run(conn, thread_id, run_id, ended_stateless=True)
        if run is None or run.claim_no == 0:
            return None
        checkpoint_id = run_rows.last_checkpoint_of_run(conn, run.thread_id, run.run_id)
    if checkpoint_id is None:
        return None
    config = run.kwargs["config"]
    user = config["configurable"].get(AUTH_USER)
    return _Checkpoint(ThreadGraph(run.thread_id, run.graph_id, config, user), checkpoint_id)


def _values(states: StateProcess, found: _Checkpoint) -> bytes:
    """Read the values in this process. Raises LargeState."""
    try:
        return state_jobs.read_values(states.here, found.thread, found.checkpoint_id)
    except (ProjectError, StateUnreadable) as error:
        log.warning(
            "cannot read the values of thread %s, returning none: %s",
            found.thread.thread_id,
            error,
        )
        return b"{}"


def _kept(parts: Parts, run_id: UUID, values: bytes) -> bytes:
    """Store values in the run's row for later requests, unless they are too large. Return the
    answer."""
    if len(values) <= parts.settings.max_outcome_bytes:
        outcome = {"values": orjson.Fragment(values), "interrupts": []}
        with parts.database.connection() as conn:
            run_rows.set_outcome(conn, run_id, outcome)
    return b"{}" if values == b"null" else values
