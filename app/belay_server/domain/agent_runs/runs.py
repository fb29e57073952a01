"""Describe agent runs: runs as the second HTTP API (Exa's) shows them. No I/O.

    queued ──▶ running ──▶ completed | failed | cancelled

The status is derived from the run's own row, so the two cannot disagree. A terminal status is
final.
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
#: The pattern that the API allows for ids. Belay's own ids are narrower.
ID_PATTERN = "^[A-Za-z0-9_.:-]+$"
LONGEST_ID = 200
_ANY_ID = re.compile(r"[A-Za-z0-9_.:-]{1,200}", re.ASCII)
_OUR_ID = re.compile(PREFIX + "[0-7][0-9a-hjkmnp-tv-z]{25}", re.ASCII)
_CROCKFORD = "0123456789abcdefghjkmnpqrstvwxyz"


def agent_run_id(run_id: UUID) -> str:
    """Return a run's UUID in the notation of a ULID.

    UUIDs of version 7 begin with the time, so these ids sort by it, and a page can continue after
    an id whose run was deleted.
    """
    number = run_id.int
    digits = [_CROCKFORD[number >> shift & 31] for shift in range(125, -1, -5)]
    return PREFIX + "".join(digits)


def run_id_of(agent_run_id: str) -> UUID | None:
    """Return the UUID of an agent run's id. Return None for an id that Belay cannot have made."""
    if not is_our_id(agent_run_id):
        return None
    number = 0
    for digit in agent_run_id.removeprefix(PREFIX):
        number = number << 5 | _CROCKFORD.index(digit)
    return UUID(int=number)


def is_any_id(text: str) -> bool:
    """Return whether the pattern for ids in Exa's API allows the text."""
    return _ANY_ID.fullmatch(text) is not None


def is_our_id(text: str) -> bool:
    """Return whether the text has the form of the ids that Belay makes."""
    return _OUR_ID.fullmatch(text) is not None


class AgentRunStatus(enum.StrEnum):
    """The statuses of an agent run in Exa's API."""

    QUEUED = "queued"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


class StopReason(enum.StrEnum):
    """The values of `stopReason` in Exa's API, which is null for an active run."""

    SCHEMA_SATISFIED = "schema_satisfied"
    STOPPED = "stopped"
    ERROR = "error"
    CANCELLED = "cancelled"


_STOP_REASONS = {
    AgentRunStatus.COMPLETED: StopReason.SCHEMA_SATISFIED,
    AgentRunStatus.FAILED: StopReason.ERROR,
    AgentRunStatus.CANCELLED: StopReason.CANCELLED,
}
#: The cancel reason of a stop: a run interrupted with it is shown as completed. The reason that was
#: accepted first is kept, so a cancel after a stop changes nothing, nor does a stop after a cancel.
STOPPED = user_cancel_reason(CancelAction.INTERRUPT, "POST /agent/runs/{id}/stop")
#: Further fields of the error of an output that does not match its schema.
_OF_A_MISMATCH = ("path", "keyword", "expected", "actual")
#: A self-hosted run has no costs, so no usage is counted.
_USAGE = {"agentComputeUnits": 0, "searches": 0, "emails": 0, "phoneNumbers": 0}
_COST = {"total": 0, "agentCompute": 0, "search": 0, "emails": 0, "phoneNumbers": 0}


@dataclass(frozen=True, slots=True)
class EncodedOutput:
    """A large output, as JSON in ASCII."""

    encoded: bytes


@dataclass(frozen=True, slots=True)
class AgentRun:
    """One row of `agent_run`, with the state of its run."""

    id: str
    run_id: UUID
    thread_id: UUID
    request: dict[str, Any]
    created_at: datetime
    #: None: the run's row is gone. It was rolled back, which only the other API can do.
    run_status: str | None
    started_at: datetime | None
    ended_at: datetime | None
    run_error: dict[str, Any] | None
    #: None also if it has not been read yet: it may be large, or in the checkpoints only.
    outcome: dict[str, Any] | EncodedOutput | None

    @property
    def is_active(self) -> bool:
        return self.run_status in ACTIVE

    @property
    def was_stopped(self) -> bool:
        """Whether a stop interrupted the run. Its output so far is kept."""
        return self.run_status == RunStatus.INTERRUPTED and self.run_error == STOPPED

    @property
    def status(self) -> AgentRunStatus:
        if self.is_active:
            # A run that lost its worker and is pending again is still shown as running.
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
        """The output. It is empty unless the run completed."""
        if self.status is not AgentRunStatus.COMPLETED:
            return NO_OUTPUT
        if isinstance(self.outcome, EncodedOutput):
            return orjson.Fragment(self.outcome.encoded)
        values = (self.outcome or {}).get("values")
        return output_of(values, structured=self.has_schema)

    @property
    def has_schema(self) -> bool:
        """Whether the request has an `outputSchema`."""
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
        """The agent run as JSON for clients.

        It has an `error` only if the run failed: the clients read that field, and Exa's
        documentation does not have it.
        """
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
    """Return a time in UTC as RFC 3339 text with milliseconds: `2026-05-07T18:31:00.000Z`."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
