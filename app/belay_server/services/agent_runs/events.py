"""The events of an agent run: it is created, it starts, it ends.

Events are not stored: they are derived from the run's row, and an event keeps its number.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from belay_server.domain.agent_runs.runs import AgentRun, AgentRunStatus, written


@dataclass(frozen=True, slots=True)
class AgentRunEvent:
    """One event of an agent run."""

    #: Starts at 1 within the run.
    number: int
    name: str
    data: dict[str, Any]
    created_at: datetime

    @property
    def document(self) -> dict[str, Any]:
        return {
            "id": str(self.number),
            "event": self.name,
            "data": self.data,
            "createdAt": written(self.created_at),
        }


def events_of(run: AgentRun) -> list[AgentRunEvent]:
    """Return the events so far, in order."""
    events = [created(run)]
    if run.started_at is not None:
        events.append(started(run, run.started_at))
    if not run.is_active:
        events.append(_terminal(run, len(events) + 1))
    return events


def created(run: AgentRun) -> AgentRunEvent:
    """Return the first event of a run."""
    data = {
        "id": run.id,
        "status": AgentRunStatus.QUEUED,
        "createdAt": written(run.created_at),
    }
    return AgentRunEvent(1, "agent_run.created", data, run.created_at)


def started(run: AgentRun, started_at: datetime) -> AgentRunEvent:
    """Return the second event of a run: a worker has started it."""
    data = {"id": run.id, "status": AgentRunStatus.RUNNING}
    return AgentRunEvent(2, "agent_run.started", data, started_at)


def _terminal(run: AgentRun, number: int) -> AgentRunEvent:
    data: dict[str, Any] = {"id": run.id, "status": run.status}
    if run.status is AgentRunStatus.COMPLETED:
        data = run.document
    elif run.status is AgentRunStatus.FAILED:
        data["error"] = run.error
    else:
        data["stopReason"] = run.stop_reason
    return AgentRunEvent(number, f"agent_run.{run.status}", data, run.ended_at or run.created_at)
