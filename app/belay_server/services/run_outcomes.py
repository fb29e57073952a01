"""What `join` and `wait` answer: the run's own end, whenever they ask."""

from __future__ import annotations

import logging
from typing import Any
from uuid import UUID

from belay_server.db import run_cancels as cancel_rows
from belay_server.db import runs as run_rows
from belay_server.domain.runs import ACTIVE, RunStatus
from belay_server.graphs import thread_state
from belay_server.graphs.project_files import ProjectError
from belay_server.graphs.serde import to_json
from belay_server.graphs.thread_saver import ThreadSaver
from belay_server.services.parts import Parts

log = logging.getLogger(__name__)

#: For a run that was deleted while somebody waited for it.
_DELETED = {"error": "RunNotFound", "message": "404: Run not found"}


class NotEnded(Exception):
    """The run is pending or running."""


def outcome_of(parts: Parts, thread_id: UUID, run_id: UUID) -> Any:
    """The answer for a run that has ended: values, with `__interrupt__`, or `__error__`.

    Raises NotEnded.
    """
    with parts.database.connection() as conn:
        ended = run_rows.run_outcome(conn, thread_id, run_id)
        if ended is None:
            return {"__error__": cancel_rows.rollback_reason(conn, run_id) or _DELETED}
    if ended.status in ACTIVE:
        raise NotEnded
    if ended.status in (RunStatus.ERROR, RunStatus.TIMEOUT):
        return {"__error__": ended.error}
    outcome = ended.outcome
    if outcome is None:
        outcome = _read_outcome(parts, thread_id, run_id)
    values = outcome.get("values")
    values = {} if values is None else values
    interrupts = outcome.get("interrupts") or []
    if interrupts and isinstance(values, dict):
        shown = [{**interrupt, "response_schema": None} for interrupt in interrupts]
        return {**values, "__interrupt__": shown}
    return values


def _read_outcome(parts: Parts, thread_id: UUID, run_id: UUID) -> dict[str, Any]:
    """The values a killed run had reached, from its own last checkpoint; kept once read."""
    with parts.database.connection() as conn:
        run = run_rows.get_thread_run(conn, thread_id, run_id, ended_stateless=True)
        if run is None or run.claim_no == 0:
            return {}
        checkpoint_id = run_rows.last_checkpoint_of_run(conn, run.thread_id, run.run_id)
    if checkpoint_id is None:
        return {}
    where = thread_state.thread_config(str(run.thread_id), {"checkpoint_id": checkpoint_id})
    try:
        graph = parts.graphs.read(run.graph_id, {**run.kwargs["config"], **where})
    except ProjectError as error:
        log.warning("values of run %s not read: %s", run.run_id, error)
        return {}
    saver = ThreadSaver(parts.database.pool)
    snapshot = thread_state.bound(graph, saver).get_state(where)  # type: ignore[arg-type]
    resting = thread_state.read_resting(graph, snapshot)
    outcome = {"values": resting.values, "interrupts": []}
    if len(to_json(outcome)) > parts.settings.max_outcome_bytes:
        return outcome  # read again for the next one who asks
    with parts.database.connection() as conn:
        run_rows.set_outcome(conn, run.run_id, outcome)
    return outcome
