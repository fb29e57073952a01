"""Describe runs: their statuses, the transitions between them, claims and endings. No I/O.

    pending ──claim──▶ running ──▶ success | error | timeout | interrupted
       ▲                  │
       └──── put back ────┘   (drain, lost lease, killed child process)

A terminal status is final. A rolled-back run has no status: its row is gone, a tombstone remains.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from belay_server.domain.run_options import RunKwargs


class RunStatus(enum.StrEnum):
    """The statuses of a run in LangGraph's API. All except the first two are terminal."""

    PENDING = "pending"
    RUNNING = "running"
    SUCCESS = "success"
    ERROR = "error"
    TIMEOUT = "timeout"
    INTERRUPTED = "interrupted"


ACTIVE = (RunStatus.PENDING, RunStatus.RUNNING)


class CancelAction(enum.StrEnum):
    """How a run is cancelled.

    `interrupt` stops it and keeps its checkpoints. `rollback` stops it, then removes the run and
    what it wrote. Until the end is written, a rollback replaces an interrupt, never the reverse.
    """

    INTERRUPT = "interrupt"
    ROLLBACK = "rollback"


#: A run's fields in the API, in the order of LangGraph's documentation of List Runs.
RUN_FIELDS = (
    "run_id",
    "thread_id",
    "assistant_id",
    "created_at",
    "updated_at",
    "status",
    "metadata",
    "kwargs",
    "multitask_strategy",
)


@dataclass(frozen=True, slots=True)
class Run:
    """One row of `run`: a request to execute an assistant on a thread."""

    run_id: UUID
    thread_id: UUID
    assistant_id: UUID
    graph_id: str
    queue: str
    status: str
    metadata: dict[str, Any]
    #: As `RunKwargs.to_document` writes them.
    kwargs: dict[str, Any]
    multitask_strategy: str
    created_at: datetime
    updated_at: datetime
    scheduled_at: datetime
    temporary: bool
    claim_no: int
    attempts: int
    lease_owner: str | None
    cancel_action: str | None
    cancel_reason: dict[str, str] | None
    error: dict[str, str] | None

    @property
    def is_active(self) -> bool:
        return self.status in ACTIVE

    @property
    def is_resumable(self) -> bool:
        """Whether clients may resume the run's stream after one of its events."""
        return bool(self.kwargs.get("resumable"))


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to write for one run. `claim_no` is the fencing token.

    The claim is valid while the run's row has the same number.
    """

    run_id: UUID
    claim_no: int

    def uncounted(self, attempts: int) -> int:
        """Return how many earlier attempts were not counted, as another run or a drain has ended
        them. `attempts` is how many are counted, this one included."""
        return self.claim_no - attempts


@dataclass(frozen=True, slots=True)
class ClaimedRun:
    """The data that an attempt needs. The statement that claims the run returns it."""

    run_id: UUID
    thread_id: UUID
    assistant_id: UUID
    graph_id: str
    kwargs: RunKwargs
    metadata: dict[str, Any]
    temporary: bool
    claim_no: int
    attempts: int
    timeout_seconds: float | None
    #: False: the thread has no checkpoints, so there are none to read.
    has_checkpoints: bool
    #: The time from when the run was allowed to start until this claim.
    waited_seconds: float

    @property
    def claim(self) -> Claim:
        return Claim(self.run_id, self.claim_no)


@dataclass(frozen=True, slots=True)
class Ending:
    """How an attempt ended, and what is written to the run and its thread.

    `values` is the graph's output as JSON. `values_known` is False if it could not be read, because
    the child process was killed: the API then reads it from the run's last checkpoint on demand.
    `interrupts` maps a task id to the interrupts that the task raised.
    """

    status: RunStatus
    values: Any = None
    values_known: bool = True
    interrupts: dict[str, list[dict[str, Any]]] | None = None
    error: dict[str, str] | None = None
    has_next: bool = False
    #: A small outcome as JSON, which is announced with the end. Empty: clients read the row.
    answer: bytes = b""

    @property
    def resting_status(self) -> str:
        """The thread's status while none of its runs is pending or running."""
        if self.status in (RunStatus.ERROR, RunStatus.TIMEOUT):
            return "error"
        return "interrupted" if self.has_next or self.interrupts else "idle"


def user_cancel_reason(action: CancelAction, route: str) -> dict[str, str]:
    """Return the reason of a client's cancel, in the words of LangGraph's server.

    `route` is the route's template, without its values.
    """
    kind = "UserInterrupt" if action is CancelAction.INTERRUPT else "UserRollback"
    return {"error": kind, "message": f"{action} requested via {route}"}


def superseded_reason(action: CancelAction, new_run_id: UUID) -> dict[str, str]:
    """Return the reason of a cancel by a new run's multitask strategy."""
    kind = "UserInterrupt" if action is CancelAction.INTERRUPT else "UserRollback"
    message = f"superseded by run {new_run_id} (multitask_strategy={action})"
    return {"error": kind, "message": message}


def disconnect_reason() -> dict[str, str]:
    """Return the reason of a cancel by `on_disconnect`."""
    message = "client disconnected from the run stream (on_disconnect=cancel)"
    return {"error": "UserInterrupt", "message": message}
