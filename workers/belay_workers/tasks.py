"""The Celery tasks: entry points, and nothing else."""

from __future__ import annotations

from uuid import UUID

from belay_server.doorbell import PING_TASK, RUN_TASK
from belay_workers.celery import app
from belay_workers.child.attempt import attempt_run


@app.task(name=RUN_TASK)
def run(run_id: str) -> None:
    """The doorbell of a run."""
    assert app.child is not None
    attempt_run(app.child, UUID(run_id))


@app.task(name=PING_TASK)
def ping() -> None:
    """Nothing to do: that it was received is what counts (`belay_workers.background.liveness`)."""
