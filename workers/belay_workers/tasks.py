"""The Celery tasks: entry points without logic of their own."""

from __future__ import annotations

from uuid import UUID

from belay_server.doorbell import PING_TASK, RUN_TASK
from belay_workers.celery import app
from belay_workers.child.attempt import attempt_run


@app.task(name=RUN_TASK)
def run(run_id: str) -> None:
    """Handle the doorbell of a run: attempt the run."""
    assert app.child is not None
    attempt_run(app.child, UUID(run_id))


@app.task(name=PING_TASK)
def ping() -> None:
    """Do nothing: only its receipt is checked (`belay_workers.background.liveness`)."""
