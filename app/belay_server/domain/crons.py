"""A cron creates runs on a schedule. No I/O."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID, uuid5

#: Namespace of the ids of the runs that crons create: one for each time they are due.
_RUNS = UUID("2b7c7f6e-93a4-5b6f-8f1e-6f7b0c2d9a11")


@dataclass(frozen=True, slots=True)
class Cron:
    """`payload` is the body of the runs it creates; without a thread each has one of its own."""

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
    #: How often in a row its run could not be stored, and why its last one was not created.
    failures: int
    last_error: str | None


@dataclass(frozen=True, slots=True)
class DueCron(Cron):
    """One that is to be fired, for whom, and what time the database has."""

    now: datetime
    maker: dict[str, Any]

    @property
    def run_id(self) -> UUID:
        assert self.next_run_date is not None
        return run_id_of(self.cron_id, self.next_run_date)


def run_id_of(cron_id: UUID, due: datetime) -> UUID:
    """The same whoever fires a cron: what was created for this time is not created again."""
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
