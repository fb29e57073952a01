"""Read and write crons. Each function runs the query of its name in `sql/crons.sql`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from psycopg.types.json import Jsonb

from belay_server.db.postgres.connection import Connection
from belay_server.db.postgres.queries import load_queries
from belay_server.db.postgres.statements import (
    execute,
    fetch_all,
    fetch_one,
    fetch_page,
    fetch_value,
)
from belay_server.domain.crons import Cron, DueCron, LockedCron

SQL = load_queries("crons")
SORT_COLUMNS = (
    "cron_id",
    "assistant_id",
    "thread_id",
    "created_at",
    "updated_at",
    "next_run_date",
    "end_time",
)


@dataclass(frozen=True, slots=True)
class CronFilter:
    """The conditions of a search or a count. None means any."""

    assistant_id: UUID | None
    thread_id: UUID | None
    enabled: bool | None
    metadata: dict[str, Any]

    def params(self) -> dict[str, Any]:
        return {
            "assistant_id": self.assistant_id,
            "thread_id": self.thread_id,
            "enabled": self.enabled,
            "metadata": Jsonb(self.metadata),
        }


@dataclass(frozen=True, slots=True)
class CronContent:
    """The fields of a cron that a client may set, and when it is next due."""

    schedule: str
    timezone: str | None
    end_time: datetime | None
    enabled: bool
    on_run_completed: str | None
    payload: dict[str, Any]
    metadata: dict[str, Any]
    next_run_date: datetime | None

    def params(self) -> dict[str, Any]:
        return {
            "schedule": self.schedule,
            "timezone": self.timezone,
            "end_time": self.end_time,
            "enabled": self.enabled,
            "on_run_completed": self.on_run_completed,
            "payload": Jsonb(self.payload),
            "metadata": Jsonb(self.metadata),
            "next_run_date": self.next_run_date,
        }


def insert_cron(
    conn: Connection,
    cron_id: UUID,
    content: CronContent,
    *,
    assistant_id: UUID,
    thread_id: UUID | None,
    maker: dict[str, Any],
) -> Cron:
    """Insert a cron. `maker` is its creator as JSON, for whom its runs are created."""
    params = {
        "cron_id": cron_id,
        "maker": Jsonb(maker),
        "assistant_id": assistant_id,
        "thread_id": thread_id,
        **content.params(),
    }
    cron = fetch_one(conn, SQL.insert_cron, params, Cron)
    assert cron is not None
    return cron


def crons_of(conn: Connection, caller: str) -> int:
    """Return how many crons a caller has. Lock that count until the end of the transaction."""
    execute(conn, SQL.lock_caller, {"caller": caller})
    return int(fetch_value(conn, SQL.count_crons_of, {"caller": caller}))


def get_cron(conn: Connection, cron_id: UUID) -> Cron | None:
    """Return a cron; None if there is none that the caller may access."""
    return fetch_one(conn, SQL.get_cron, {"cron_id": cron_id}, Cron)


def lock_cron(conn: Connection, cron_id: UUID) -> LockedCron | None:
    """Lock a cron until the transaction ends. Return None if there is none."""
    return fetch_one(conn, SQL.lock_cron, {"cron_id": cron_id}, LockedCron)


def update_cron(conn: Connection, cron_id: UUID, content: CronContent) -> Cron | None:
    """Replace a cron's content, and clear its failures. Return None if there is no such cron."""
    return fetch_one(conn, SQL.update_cron, {"cron_id": cron_id, **content.params()}, Cron)


def end_crons_of_assistant(
    conn: Connection, assistant_id: UUID, *, user: str | None, reason: str
) -> None:
    """Delete the crons of this user that use an assistant, and disable those of other users."""
    params = {"assistant_id": assistant_id, "user": user, "reason": reason}
    execute(conn, SQL.end_crons_of_assistant, params)


def count_enabled_crons(conn: Connection, callers: Sequence[str]) -> int:
    """Return the number of enabled crons that these callers have created."""
    return int(fetch_value(conn, SQL.count_enabled_crons, {"callers": list(callers)}))


def disable_crons(conn: Connection, callers: Sequence[str]) -> int:
    """Disable the crons that these callers have created, and return their number."""
    return int(fetch_value(conn, SQL.disable_crons, {"callers": list(callers)}))


def delete_cron(conn: Connection, cron_id: UUID) -> bool:
    """Delete a cron. Return False if there is none that the caller may access."""
    return fetch_value(conn, SQL.delete_cron, {"cron_id": cron_id}) is not None


def search_crons(
    conn: Connection,
    filter_: CronFilter,
    *,
    sort_by: str,
    sort_order: str,
    limit: int,
    offset: int,
) -> list[Cron]:
    """Return a page of crons. Raises ValueError for an unknown column or order."""
    if sort_by not in SORT_COLUMNS or sort_order not in ("asc", "desc"):
        raise ValueError(f"cannot sort by {sort_by} {sort_order}")
    sql = SQL.search_crons.format(sort_by=sort_by, sort_order=sort_order)
    return fetch_page(conn, sql, filter_.params() | {"limit": limit, "offset": offset}, Cron)


def count_crons(conn: Connection, filter_: CronFilter) -> int:
    """Return how many crons match the filter, of those that the caller may access."""
    return int(fetch_value(conn, SQL.count_crons, filter_.params()))


@dataclass(frozen=True, slots=True)
class DueCronId:
    """A due cron, and whether it is the first one of its caller."""

    cron_id: UUID
    is_first: bool


def due_crons(conn: Connection, *, limit: int) -> list[DueCronId]:
    """Return the crons that are due, in turn for each caller."""
    return fetch_all(conn, SQL.due_crons, {"limit": limit}, DueCronId)


def lock_due_cron(conn: Connection, cron_id: UUID) -> DueCron | None:
    """Lock a cron. Return None if it is not due, or another worker has locked it."""
    return fetch_one(conn, SQL.lock_due_cron, {"cron_id": cron_id}, DueCron)


def put_off_cron(
    conn: Connection,
    cron_id: UUID,
    *,
    again_at: datetime,
    failures: int,
    last_error: str,
    enabled: bool,
) -> None:
    """Postpone a cron whose run could not be stored. The caller has locked the row."""
    params = {
        "cron_id": cron_id,
        "again_at": again_at,
        "failures": failures,
        "last_error": last_error,
        "enabled": enabled,
    }
    execute(conn, SQL.put_off_cron, params)


def set_last_error(conn: Connection, cron_id: UUID, last_error: str) -> None:
    """Record why the run of a due time was not created."""
    execute(conn, SQL.set_last_error, {"cron_id": cron_id, "last_error": last_error})


def set_next_run_date(conn: Connection, cron_id: UUID, next_run_date: datetime | None) -> None:
    """Set when a cron is next due (None: never), and clear its failures and its last error."""
    params = {"cron_id": cron_id, "next_run_date": next_run_date}
    execute(conn, SQL.set_next_run_date, params)
