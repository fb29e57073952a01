"""Threads in Postgres. Each function runs the query of its own name in `sql/threads.sql`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from psycopg.types.json import Jsonb

from belay_server.db.connection import (
    Connection,
    execute,
    fetch_all,
    fetch_dicts,
    fetch_one,
    fetch_page,
    fetch_value,
)
from belay_server.db.queries import load_queries
from belay_server.domain.threads import Thread, ThreadTtl

SQL = load_queries("threads")
SORT_COLUMNS = ("thread_id", "created_at", "updated_at", "state_updated_at", "status")


@dataclass(frozen=True, slots=True)
class ThreadFilter:
    """Which threads a search or a count sees; None means any."""

    ids: Sequence[UUID] | None
    metadata: dict[str, Any]
    values: dict[str, Any] | None
    status: str | None

    def params(self) -> dict[str, Any]:
        return {
            "ids": list(self.ids) if self.ids else None,
            "metadata": Jsonb(self.metadata),
            "values": None if self.values is None else Jsonb(self.values),
            "status": self.status,
        }


def ttl_params(ttl: ThreadTtl | None) -> dict[str, Any]:
    return {
        "ttl_minutes": None if ttl is None else ttl.minutes,
        "ttl_strategy": None if ttl is None else ttl.strategy,
    }


@dataclass(frozen=True, slots=True)
class ExpiredThread:
    thread_id: UUID
    ttl_strategy: str


@dataclass(frozen=True, slots=True)
class ThreadStorage:
    """Counts, and bytes before Postgres compresses them."""

    checkpoint_count: int
    checkpoint_bytes: int
    value_count: int
    value_bytes: int
    by_channel: dict[str, dict[str, int]]
    write_count: int
    write_bytes: int


@dataclass(frozen=True, slots=True)
class DeletedThread:
    """A thread that is gone, and the runs that went with it."""

    thread_id: UUID
    run_ids: list[UUID]


def insert_thread(
    conn: Connection, thread_id: UUID, metadata: dict[str, Any], ttl: ThreadTtl | None = None
) -> bool:
    """False when the id is taken."""
    execute(conn, SQL.replace_hidden_thread, {"thread_id": thread_id})
    params = {"thread_id": thread_id, "metadata": Jsonb(metadata), **ttl_params(ttl)}
    return fetch_value(conn, SQL.insert_thread, params) is not None


def get_thread(conn: Connection, thread_id: UUID, *, with_values: bool = False) -> Thread | None:
    """Return a thread. Its values are None unless they are asked for: they may be large."""
    params = {"thread_id": thread_id, "with_values": with_values}
    return fetch_one(conn, SQL.get_thread, params, Thread)


def questions_of_thread(conn: Connection, thread_id: UUID) -> list[str]:
    """Return the ids of the interrupts that a thread waits for an answer to."""
    rows = fetch_dicts(conn, SQL.questions_of_thread, {"thread_id": thread_id})
    return [row["id"] for row in rows]


def lock_thread(conn: Connection, thread_id: UUID, *, ended_stateless: bool = False) -> bool:
    """Lock the thread's row to the end of the transaction. False: there is none."""
    params = {"thread_id": thread_id, "ended_stateless": ended_stateless}
    return fetch_value(conn, SQL.lock_thread, params) is not None


def patch_thread(
    conn: Connection, thread_id: UUID, metadata: dict[str, Any], ttl: ThreadTtl | None = None
) -> bool:
    """Merge into the metadata, at the top level; a ttl replaces the one there is."""
    params = {"thread_id": thread_id, "metadata": Jsonb(metadata), **ttl_params(ttl)}
    return fetch_value(conn, SQL.patch_thread, params) is not None


def delete_thread(conn: Connection, thread_id: UUID) -> DeletedThread | None:
    """With its runs and checkpoints. None: there is none."""
    execute(conn, SQL.delete_thread_checkpoints, {"thread_ids": [str(thread_id)]})
    return fetch_one(conn, SQL.delete_thread, {"thread_id": thread_id}, DeletedThread)


def copy_thread(conn: Connection, thread_id: UUID, copy_id: UUID, metadata: dict[str, Any]) -> bool:
    """A thread of its own with the same state and history, without the runs, and with this added
    to its metadata. False: no such."""
    params = {"thread_id": thread_id, "copy_id": copy_id, "metadata": Jsonb(metadata)}
    if fetch_value(conn, SQL.copy_thread, params) is None:
        return False
    execute(conn, SQL.copy_checkpoints, {"thread_id": str(thread_id), "copy_id": str(copy_id)})
    return True


def thread_storage(conn: Connection, thread_id: UUID) -> ThreadStorage:
    """How much of the database a thread's history takes."""
    row = fetch_one(conn, SQL.thread_storage, {"thread_id": str(thread_id)}, ThreadStorage)
    assert row is not None
    return row


def repeatable_read(conn: Connection) -> None:
    """As the first thing in a transaction: all of it sees one state of the database."""
    execute(conn, SQL.repeatable_read, {})


def expired_threads(
    conn: Connection, *, limit: int, but: Sequence[UUID] = ()
) -> list[ExpiredThread]:
    """Idle ones, the longest expired first; `but`: those to pass over."""
    params = {"limit": limit, "but": list(but)}
    return fetch_all(conn, SQL.expired_threads, params, ExpiredThread)


def thread_is_expired(conn: Connection, thread_id: UUID) -> bool:
    """Still, and idle. The thread's row is locked."""
    return bool(fetch_value(conn, SQL.thread_is_expired, {"thread_id": thread_id}))


def thread_has_been_pruned(conn: Connection, thread_id: UUID) -> None:
    """It does not expire again before it is used again."""
    execute(conn, SQL.thread_has_been_pruned, {"thread_id": thread_id})


def delete_hidden_thread(conn: Connection, thread_id: UUID) -> DeletedThread | None:
    """The thread of a stateless run, once nobody waits for its outcome any more."""
    execute(conn, SQL.bury_chosen_runs, {"thread_id": thread_id})
    return delete_thread(conn, thread_id)


def hidden_threads(
    conn: Connection, *, seconds: float, limit: int, but: Sequence[UUID] = ()
) -> list[UUID]:
    """Threads of stateless runs that ended at least `seconds` ago; `but`: those to pass over."""
    params = {"seconds": seconds, "limit": limit, "but": list(but)}
    rows = fetch_dicts(conn, SQL.hidden_threads, params)
    return [row["thread_id"] for row in rows]


def search_threads(
    conn: Connection,
    filter_: ThreadFilter,
    *,
    sort_by: str,
    sort_order: str,
    limit: int,
    offset: int,
    with_values: bool,
) -> list[Thread]:
    """Return a page of threads. Their values are None unless they are asked for."""
    sql = _ordered(SQL.search_threads, sort_by, sort_order)
    page = {"limit": limit, "offset": offset, "with_values": with_values}
    return fetch_page(conn, sql, filter_.params() | page, Thread)


def threads_with_unknown_values(conn: Connection, filter_: ThreadFilter) -> list[Thread]:
    """Those of the filter whose last run was killed, and whose values nobody has asked for."""
    return fetch_all(conn, SQL.threads_with_unknown_values, filter_.params(), Thread)


def _ordered(sql: str, sort_by: str, sort_order: str) -> str:
    """The only identifiers that come from a request, and only from these two lists."""
    if sort_by not in SORT_COLUMNS or sort_order not in ("asc", "desc"):
        raise ValueError(f"cannot sort by {sort_by} {sort_order}")
    return sql.format(sort_by=sort_by, sort_order=sort_order)


def count_threads(conn: Connection, filter_: ThreadFilter) -> int:
    return int(fetch_value(conn, SQL.count_threads, filter_.params()))


def rest_thread(
    conn: Connection,
    thread_id: UUID,
    *,
    values: Any,
    interrupts: dict[str, Any],
    resting_status: str | None,
    keep_error: bool,
    newest: str | None,
) -> None:
    """Set the thread to what its newest checkpoint says. A status of None stays as it is.

    Nothing is done when a run is in flight, or when `newest` is not its newest checkpoint any more:
    whoever has made another one says what the thread is. None is not looked at.
    """
    params = {
        "thread_id": thread_id,
        "values": Jsonb(values),
        "interrupts": Jsonb(interrupts),
        "resting_status": resting_status,
        "keep_error": keep_error,
        "newest": newest,
    }
    execute(conn, SQL.rest_thread, params)


def forget_values(conn: Connection, thread_id: UUID) -> None:
    """Have the thread's values read from its newest checkpoint, which has just been written."""
    execute(conn, SQL.forget_values, {"thread_id": thread_id})


def newest_checkpoints(conn: Connection, thread_id: UUID, namespace: str) -> list[str | None]:
    """Return the ids of the newest checkpoints of a thread's graph and of one of its subgraphs."""
    params = {"thread_id": str(thread_id), "namespaces": ["", namespace]}
    return [row["newest"] for row in fetch_dicts(conn, SQL.newest_checkpoints, params)]
