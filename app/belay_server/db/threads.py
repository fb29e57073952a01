"""Read and write threads. Each function runs the query of its name in `sql/threads.sql`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from psycopg.types.json import Jsonb

from belay_server.db.postgres.connection import Connection
from belay_server.db.postgres.queries import load_queries
from belay_server.db.postgres.statements import (
    execute,
    fetch_all,
    fetch_dicts,
    fetch_one,
    fetch_page,
    fetch_value,
)
from belay_server.domain.threads import Thread, ThreadDefaults, ThreadTtl

SQL = load_queries("threads")
SORT_COLUMNS = ("thread_id", "created_at", "updated_at", "state_updated_at", "status")


@dataclass(frozen=True, slots=True)
class ThreadFilter:
    """The conditions of a search or a count. None means any."""

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
    """Return the parameters of a TTL, in minutes; None for each without one."""
    return {
        "ttl_minutes": None if ttl is None else ttl.minutes,
        "ttl_strategy": None if ttl is None else ttl.strategy,
    }


@dataclass(frozen=True, slots=True)
class ExpiredThread:
    """An expired thread, and the strategy of its TTL."""

    thread_id: UUID
    ttl_strategy: str


@dataclass(frozen=True, slots=True)
class ThreadStorage:
    """The size of a thread's history: counts, and bytes before compression by Postgres."""

    checkpoint_count: int
    checkpoint_bytes: int
    value_count: int
    value_bytes: int
    by_channel: dict[str, dict[str, int]]
    write_count: int
    write_bytes: int


@dataclass(frozen=True, slots=True)
class DeletedThread:
    """A deleted thread and the runs that were deleted with it."""

    thread_id: UUID
    run_ids: list[UUID]


def insert_thread(
    conn: Connection, thread_id: UUID, metadata: dict[str, Any], ttl: ThreadTtl | None = None
) -> bool:
    """Insert a thread. Return False if the id is taken."""
    execute(conn, SQL.replace_hidden_thread, {"thread_id": thread_id})
    params = {"thread_id": thread_id, "metadata": Jsonb(metadata), **ttl_params(ttl)}
    return fetch_value(conn, SQL.insert_thread, params) is not None


def get_thread(conn: Connection, thread_id: UUID, *, with_values: bool = False) -> Thread | None:
    """Return a thread. Without `with_values` its values, which may be large, are None."""
    params = {"thread_id": thread_id, "with_values": with_values}
    return fetch_one(conn, SQL.get_thread, params, Thread)


def thread_defaults(conn: Connection, thread_id: UUID) -> ThreadDefaults | None:
    """Return what a thread gives to its runs. Return None if there is no such thread."""
    return fetch_one(conn, SQL.thread_defaults, {"thread_id": thread_id}, ThreadDefaults)


def interrupt_ids_of_thread(conn: Connection, thread_id: UUID) -> list[str]:
    """Return the ids of a thread's pending interrupts."""
    rows = fetch_dicts(conn, SQL.interrupt_ids_of_thread, {"thread_id": thread_id})
    return [row["id"] for row in rows]


def lock_thread(conn: Connection, thread_id: UUID, *, ended_stateless: bool = False) -> bool:
    """Lock a thread's row until the end of the transaction. Return False if there is none."""
    params = {"thread_id": thread_id, "ended_stateless": ended_stateless}
    return fetch_value(conn, SQL.lock_thread, params) is not None


def patch_thread(
    conn: Connection, thread_id: UUID, metadata: dict[str, Any], ttl: ThreadTtl | None = None
) -> bool:
    """Merge into a thread's metadata, at the top level. A ttl replaces the current one.

    Return False if there is no such thread.
    """
    params = {"thread_id": thread_id, "metadata": Jsonb(metadata), **ttl_params(ttl)}
    return fetch_value(conn, SQL.patch_thread, params) is not None


def delete_thread(conn: Connection, thread_id: UUID) -> DeletedThread | None:
    """Delete a thread with its runs and checkpoints. Return None if there is no such thread."""
    execute(conn, SQL.delete_thread_checkpoints, {"thread_ids": [str(thread_id)]})
    return fetch_one(conn, SQL.delete_thread, {"thread_id": thread_id}, DeletedThread)


def copy_thread(conn: Connection, thread_id: UUID, copy_id: UUID, metadata: dict[str, Any]) -> bool:
    """Copy a thread's state and history without its runs, and add to the copy's metadata.

    Return False if there is no such thread.
    """
    params = {"thread_id": thread_id, "copy_id": copy_id, "metadata": Jsonb(metadata)}
    if fetch_value(conn, SQL.copy_thread, params) is None:
        return False
    execute(conn, SQL.copy_checkpoints, {"thread_id": str(thread_id), "copy_id": str(copy_id)})
    return True


def thread_storage(conn: Connection, thread_id: UUID) -> ThreadStorage:
    """Return the size of a thread's history."""
    row = fetch_one(conn, SQL.thread_storage, {"thread_id": str(thread_id)}, ThreadStorage)
    assert row is not None
    return row


def repeatable_read(conn: Connection) -> None:
    """Give the transaction a single snapshot. This must be its first statement."""
    execute(conn, SQL.repeatable_read, {})


def expired_threads(
    conn: Connection, *, limit: int, but: Sequence[UUID] = ()
) -> list[ExpiredThread]:
    """Return expired threads without active runs, longest expired first, except those in `but`."""
    params = {"limit": limit, "but": list(but)}
    return fetch_all(conn, SQL.expired_threads, params, ExpiredThread)


def thread_is_expired(conn: Connection, thread_id: UUID) -> bool:
    """Return whether a thread is expired and not busy. The caller has locked the thread's row."""
    return bool(fetch_value(conn, SQL.thread_is_expired, {"thread_id": thread_id}))


def thread_has_been_pruned(conn: Connection, thread_id: UUID) -> None:
    """Mark a thread as pruned. It does not expire again until it has been used again."""
    execute(conn, SQL.thread_has_been_pruned, {"thread_id": thread_id})


def delete_hidden_thread(conn: Connection, thread_id: UUID) -> DeletedThread | None:
    """Delete the thread of a stateless run whose outcome is no longer needed.

    Runs whose id the client chose leave a tombstone. Return None if there is no such thread.
    """
    execute(conn, SQL.bury_chosen_runs, {"thread_id": thread_id})
    return delete_thread(conn, thread_id)


def hidden_threads(
    conn: Connection, *, seconds: float, limit: int, but: Sequence[UUID] = ()
) -> list[UUID]:
    """Return threads of stateless runs that ended over `seconds` ago, except those in `but`."""
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
    """Return a page of threads. Without `with_values` their values are None."""
    sql = _ordered(SQL.search_threads, sort_by, sort_order)
    page = {"limit": limit, "offset": offset, "with_values": with_values}
    return fetch_page(conn, sql, filter_.params() | page, Thread)


def threads_with_unknown_values(conn: Connection, filter_: ThreadFilter) -> list[Thread]:
    """Return threads of the filter whose values have to be read from their checkpoint.

    That is so after a killed run or an update, until the values are read. Busy threads are left
    out. The filter's status and values are ignored.
    """
    return fetch_all(conn, SQL.threads_with_unknown_values, filter_.params(), Thread)


def _ordered(sql: str, sort_by: str, sort_order: str) -> str:
    """Return a query with its order. These are the only SQL identifiers taken from a request."""
    if sort_by not in SORT_COLUMNS or sort_order not in ("asc", "desc"):
        raise ValueError(f"cannot sort by {sort_by} {sort_order}")
    return sql.format(sort_by=sort_by, sort_order=sort_order)


def count_threads(conn: Connection, filter_: ThreadFilter) -> int:
    """Return how many threads match the filter, of those that the caller may access."""
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
    """Update a thread's row from its newest checkpoint. A status of None is left as it is.

    Do nothing if a run is active, or if `newest` is given and no longer the newest checkpoint: its
    successor's writer then updates the row.
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
    """Mark a thread's values as unknown, to be read from the checkpoint that was just written."""
    execute(conn, SQL.forget_values, {"thread_id": thread_id})


def has_checkpoints(conn: Connection, thread_id: UUID) -> bool:
    """Return whether a thread has checkpoints, of its graph or of a subgraph."""
    return bool(fetch_value(conn, SQL.has_checkpoints, {"thread_id": thread_id}))


def newest_checkpoints(conn: Connection, thread_id: UUID, namespace: str) -> list[str | None]:
    """Return the ids of the newest checkpoints of a thread's graph and of one of its subgraphs."""
    params = {"thread_id": str(thread_id), "namespaces": ["", namespace]}
    return [row["newest"] for row in fetch_dicts(conn, SQL.newest_checkpoints, params)]
