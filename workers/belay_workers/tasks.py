"""The Celery tasks, by whose names the consumer knows its messages. The pool executes them."""

from __future__ import annotations

from belay_server.doorbell import PING_TASK, RUN_TASK
from belay_workers.celery import app


@app.task(name=RUN_TASK)
def run(run_id: str) -> None:
    """Handle the doorbell of a run."""
    raise NotImplementedError(f"only the pool of `belay worker` executes runs, not {run_id} here")


@app.task(name=PING_TASK)
def ping() -> None:
    """Do nothing: only its receipt is checked (`belay_workers.background.liveness`)."""
