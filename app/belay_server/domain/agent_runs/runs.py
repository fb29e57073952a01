"""Agent runs: runs as the second HTTP API (Exa's) shows them. Ids, words and rules; no I/O.

    queued ──▶ running ──▶ completed | failed | cancelled

All of it follows from the row of the run itself, so there is nothing that could disagree. A
terminal status is final.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import orjson

from belay_server.domain.agent_runs.outputs import NO_OUTPUT, output_of
from belay_server.domain.runs import ACTIVE, CancelAction, RunStatus, user_cancel_reason

PREFIX = "agent_run_"
#: What any id may look like; ours are narrower.
ID_PATTERN = "^[A-Za-z0-9_.:-]+$"
LONGEST_ID = 200
_ANY_ID = re.compile(r"[A-Za-z0-9_.:-]{1,200}", re.ASCII)
_OUR_ID = re.compile(PREFIX + "[0-7][0-9a-hjkmnp-tv-z]{25}", re.ASCII)
_CROCKFORD = "0123456789abcdefghjkmnpqrstvwxyz"


def agent_run_id(run_id: UUID) -> str:
    """The run's own UUID, written as a ULID is. UUIDs of version 7 begin with the time, so these
    ids sort by it, and a page can go on behind an id whose run is gone."""
    number = run_id.int
    digits = [_CROCKFORD[number >> shift & 31] for shift in range(125, -1, -5)]
    return PREFIX + "".join(digits)


def run_id_of(agent_run_id: str) -> UUID | None:
    """The run that an id stands for; None for what is no id of ours."""
    if not is_our_id(agent_run_id):
        return None
    number = 0
    for digit in agent_run_id.removeprefix(PREFIX):
        number = number << 5 | _CROCKFORD.index(digit)
    return UUID(int=number)


def is_any_id(text: str) -> bool:
    """Whether it has the shape that the API allows for ids."""
    return _ANY_ID.fullmatch(text) is not None


def is_our_id(text: str) -> bool:
    """Whether it could be the id of an agent run of ours."""
    return _OUR_ID.fullmatch(text) is not None


class AgentRunStatus(enum.StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


class StopReason(enum.StrEnum):
    SCHEMA_SATISFIED = "schema_satisfied"
    STOPPED = "stopped"
    ERROR = "error"
    CANCELLED = "cancelled"


_STOP_REASONS = {
    AgentRunStatus.COMPLETED: StopReason.SCHEMA_SATISFIED,
    AgentRunStatus.FAILED: StopReason.ERROR,
    AgentRunStatus.CANCELLED: StopReason.CANCELLED,
}
#: What a run is interrupted by that ends as completed. What was accepted first is kept, so a cancel
#: that comes later changes nothing, nor does a stop that comes after a cancel.
STOPPED = user_cancel_reason(CancelAction.INTERRUPT, "POST /agent/runs/{id}/stop")
#: What an error says of an output that has another shape than was asked for.
_OF_A_MISMATCH = ("path", "keyword", "expected", "actual")
#: Nothing is bought here, so nothing is counted.
_USAGE = {"agentComputeUnits": 0, "searches": 0, "emails": 0, "phoneNumbers": 0}
_COST = {"total": 0, "agentCompute": 0, "search": 0, "emails": 0, "phoneNumbers": 0}


@dataclass(frozen=True, slots=True)
class EncodedOutput:
    """An output that is large, as JSON in ASCII."""

    encoded: bytes


@dataclass(frozen=True, slots=True)
class AgentRun:
    """One row of `agent_run`, and what has become of its run."""

    id: str
    run_id: UUID
    thread_id: UUID
    request: dict[str, Any]
    created_at: datetime
    #: None: the run was rolled back, which only the other API can do.
    run_status: str | None
    started_at: datetime | None
    ended_at: datetime | None
    run_error: dict[str, Any] | None
    #: None also where it has not been read yet: it may be large, or in the checkpoints only.
    outcome: dict[str, Any] | EncodedOutput | None

    @property
    def is_active(self) -> bool:
        return self.run_status in ACTIVE

    @property
    def was_stopped(self) -> bool:
        """Interrupted by a stop, which keeps what it had reached."""
        return self.run_status == RunStatus.INTERRUPTED and self.run_error == STOPPED

    @property
    def status(self) -> AgentRunStatus:
        if self.is_active:
            # One that lost its worker and waits for another has been running all the same.
            return AgentRunStatus.QUEUED if self.started_at is None else AgentRunStatus.RUNNING
        if self.run_status == RunStatus.SUCCESS or self.was_stopped:
            return AgentRunStatus.COMPLETED
        if self.run_status in (RunStatus.ERROR, RunStatus.TIMEOUT):
            return AgentRunStatus.FAILED
        return AgentRunStatus.CANCELLED

    @property
    def stop_reason(self) -> StopReason | None:
        return StopReason.STOPPED if self.was_stopped else _STOP_REASONS.get(self.status)

    @property
    def output(self) -> dict[str, Any] | orjson.Fragment:
        """Empty unless it completed: a failed or cancelled run has no results."""
        if self.status is not AgentRunStatus.COMPLETED:
            return NO_OUTPUT
        if isinstance(self.outcome, EncodedOutput):
            return orjson.Fragment(self.outcome.encoded)
        values = (self.outcome or {}).get("values")
        return output_of(values, structured=self.has_schema)

    @property
    def has_schema(self) -> bool:
        """Whether a structured output was asked for."""
        return self.request.get("outputSchema") is not None

    @property
    def error(self) -> dict[str, Any] | None:
        if self.status is not AgentRunStatus.FAILED:
            return None
        found = self.run_error or {}
        return {
            "type": "SERVER_ERROR",
            "code": "TIMEOUT" if self.run_status == RunStatus.TIMEOUT else "SERVER_ERROR",
            "message": found.get("message") or found.get("error") or "The run failed.",
            **{key: found[key] for key in _OF_A_MISMATCH if key in found},
        }

    @property
    def document(self) -> dict[str, Any]:
        """On the wire. `error` is there only when there is one: the clients read it, and the
        documents do not have it."""
        document = {
            "id": self.id,
            "object": "agent_run",
            "status": self.status,
            "stopReason": self.stop_reason,
            "createdAt": written(self.created_at),
            "completedAt": None if self.ended_at is None else written(self.ended_at),
            "request": self.request,
            "output": self.output,
            "usage": _USAGE,
            "costDollars": _COST,
        }
        error = self.error
        return document if error is None else {**document, "error": error}


def written(moment: datetime) -> str:
    """`2026-05-07T18:31:00.000Z`"""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
