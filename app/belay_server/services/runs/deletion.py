"""Read and delete runs."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from belay_server.db import runs as run_rows
from belay_server.db import threads as thread_rows
from belay_server.db.postgres.connection import Connection
from belay_server.db.postgres.pool import Database
from belay_server.db.run_cancels import CancelFilter
from belay_server.domain.errors import NotFound
from belay_server.domain.runs import Run
from belay_server.services.parts import Parts
from belay_server.services.runs.cancellation import stop_runs


def get_run(conn: Connection, thread_id: UUID, run_id: UUID) -> Run:
    """Return a run. Raises NotFound, with a different message for an unknown thread."""
    run = run_rows.get_thread_run(conn, thread_id, run_id)
    if run is None:
        if thread_rows.get_thread(conn, thread_id) is None:
            raise NotFound(f"Thread with ID {thread_id} not found")
        raise NotFound()
    return run


def list_runs(
    database: Database,
    thread_id: UUID,
    *,
    status: str | None,
    metadata: dict[str, Any],
    limit: int,
    offset: int,
) -> list[Run]:
    """Return a page of the thread's runs, newest first. Raises NotFound for an unknown thread."""
    with database.connection() as conn:
        if thread_rows.get_thread(conn, thread_id) is None:
            raise NotFound(f"Thread with ID {thread_id} not found")
        return run_rows.list_runs(
            conn, thread_id, status=status, metadata=metadata, limit=limit, offset=offset
        )


def delete_run(parts: Parts, thread_id: UUID, run_id: UUID) -> None:
    """Delete a run's record. Stop an active run first. Raises NotFound."""
    with parts.database.connection() as conn:
        run = run_rows.get_thread_run(conn, thread_id, run_id)
    if run is None:
        raise NotFound("Run not found")
    if run.is_active:
        reason = {
            "error": "UserInterrupt",
            "message": "interrupt requested via DELETE /threads/{thread_id}/runs/{run_id}",
        }
        stop_runs(parts, CancelFilter(thread_id=thread_id, run_ids=[run_id]), reason)
    with parts.database.connection() as conn:
        if not run_rows.delete_finished_run(conn, thread_id, run_id):
            raise NotFound("Run not found")
