"""Describe crons, which create runs on a schedule. No I/O."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID, uuid5

#: The namespace of the ids of runs that crons create. There is one id for each due time.
_RUNS = UUID("2b7c7f6e-93a4-5b6f-8f1e-6f7b0c2d9a11")


@dataclass(frozen=True, slots=True)
class Cron:
    """A cron. `payload` is the body of its runs. Without a thread, each run has its own."""

    cron_id: UUID
    assistant_id: UUID
    thread_id: UUID | None
    schedule: str
    timezone: str | None
    end_time: datetime | None
    enabled: bool
    on_run_completed: str | None
    payload: dict[str, Any]
    metadata: dict[str, Any]
    next_run_date: datetime | None
    created_at: datetime
    updated_at: datetime
    #: How many times in a row its run could not be stored, and why the last one was not created.
    failures: int
    last_error: str | None


@dataclass(frozen=True, slots=True)
class LockedCron(Cron):
    """A cron whose row is locked, with its creator, for whom its runs are created."""

    maker: dict[str, Any]

    @property
    def user(self) -> str | None:
        """The identity of the project's user who created it; None without one."""
        user = self.maker.get("user") or {}
        return user.get("identity")


@dataclass(frozen=True, slots=True)
class DueCron(LockedCron):
    """A cron that is due, with the database's time."""

    now: datetime

    @property
    def run_id(self) -> UUID:
        """The id of the run for the current due time."""
        assert self.next_run_date is not None
        return run_id_of(self.cron_id, self.next_run_date)


def run_id_of(cron_id: UUID, due: datetime) -> UUID:
    """Return the id of a cron's run for a due time.

    It is the same in every worker, so the run for one due time is created only once.
    """
    return uuid5(_RUNS, f"{cron_id} {due.timestamp()}")


CRON_FIELDS = (
    "cron_id",
    "assistant_id",
    "thread_id",
    "on_run_completed",
    "end_time",
    "schedule",
    "timezone",
    "created_at",
    "updated_at",
    "payload",
    "next_run_date",
    "metadata",
    "enabled",
)
