"""Run statements and transactions, and turn rows into dataclasses.

After a conflict with another transaction (a deadlock, a serialization failure, a lock timeout) the
statement or the whole transaction is retried here a few times; callers do not notice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, suppress
from typing import Any, TypeVar, cast

import psycopg
import tenacity
from psycopg.pq import TransactionStatus
from psycopg.rows import dict_row, scalar_row

from belay_server.db.postgres.connection import Connection
from belay_server.db.postgres.outages import CONFLICT
from belay_server.domain.errors import TooMuch
from belay_server.runtime.turns import wait_for_turn

Params = dict[str, Any]
Row = TypeVar("Row")
_T = TypeVar("_T")

_AGAIN = tenacity.Retrying(
    retry=tenacity.retry_if_exception_type(CONFLICT),
    wait=tenacity.wait_random_exponential(multiplier=0.02, max=0.5),
    stop=tenacity.stop_after_attempt(8),
    reraise=True,
)
#: In bytes. Reading this much JSON takes about a millisecond.
_LARGE_ROW = 64 * 1024


def in_transaction(conn: Connection, work: Callable[[], _T]) -> _T:
    """Run `work` in one transaction on this connection. Retry it after a conflict."""

    def once() -> _T:
        with conn.transaction():
            return work()

    return _again_on_conflict(conn, once)


def _again_on_conflict(conn: Connection, work: Callable[[], _T]) -> _T:
    """Run `work`, and retry it after a conflict unless it is part of a transaction.

    A part cannot be retried by itself: `in_transaction` retries the whole transaction.
    """
    if conn.info.transaction_status is not TransactionStatus.IDLE:
        return work()
    return again_on_conflict(work)


def again_on_conflict(work: Callable[[], _T]) -> _T:
    """Run idempotent `work`, and retry it after a conflict, a few times."""
    with suppress(*CONFLICT):
        return work()
    return _AGAIN(work)


def _fields_of(row: type[Row]) -> Callable[[psycopg.Cursor[Any]], Callable[[Sequence[Any]], Row]]:
    """Return a row factory that fills a dataclass by column name. Further columns are ignored."""
    names = [field.name for field in dataclasses.fields(row)]  # type: ignore[arg-type]

    def factory(cursor: psycopg.Cursor[Any]) -> Callable[[Sequence[Any]], Row]:
        columns = {c.name: i for i, c in enumerate(cursor.description or ())}
        if not columns:
            return lambda values: row(*values)
        pick = [columns[name] for name in names]
        return lambda values: row(*[values[i] for i in pick])

    return factory


def fetch_one(conn: Connection, sql: str, params: Params, row: type[Row]) -> Row | None:
    """Return the first row, or None."""

    def run() -> Row | None:
        with conn.cursor(row_factory=_fields_of(row)) as cursor:
            return cursor.execute(sql, conn.allowed | params).fetchone()

    return _again_on_conflict(conn, run)


def fetch_all(conn: Connection, sql: str, params: Params, row: type[Row]) -> list[Row]:
    """Return all rows."""

    def run() -> list[Row]:
        with conn.cursor(row_factory=_fields_of(row)) as cursor:
            return cursor.execute(sql, conn.allowed | params).fetchall()

    return _again_on_conflict(conn, run)


def fetch_page(conn: Connection, sql: str, params: Params, row: type[Row]) -> list[Row]:
    """Return all rows of a page whose content comes from clients.

    The rows are read one by one. Raises TooMuch as soon as several have more than the connection's
    `most_bytes` together; a single row is always returned.
    """

    def run() -> list[Row]:
        found: list[Row] = []
        size = 0
        conn.has_streamed = True
        with (
            conn.cursor(row_factory=_fields_of(row)) as cursor,
            closing(cast(Generator[Row], cursor.stream(sql, conn.allowed | params))) as rows,
        ):
            for one in rows:
                found.append(one)
                row_bytes = _bytes_of_row(cursor)
                size += row_bytes
                if row_bytes > _LARGE_ROW:
                    wait_for_turn()
                if size > conn.most_bytes and len(found) > 1:
                    raise TooMuch(conn.most_bytes)
        return found

    return _again_on_conflict(conn, run)


def end_row_by_row_mode(conn: Connection) -> None:
    """Prepare a connection for a pipeline.

    After a statement whose rows were read one by one, libpq would do the same with the first
    statement of a pipeline, and psycopg would raise InternalError. Any statement outside of a
    pipeline ends this mode.
    """
    if conn.has_streamed:
        conn.execute("")
        conn.has_streamed = False


def _bytes_of_row(cursor: psycopg.Cursor[Any]) -> int:
    """Return the size of the row that has just been read."""
    result = cursor.pgresult
    if result is None:
        return 0
    return sum(len(result.get_value(0, column) or b"") for column in range(result.nfields))


def fetch_dicts(conn: Connection, sql: str, params: Params) -> list[dict[str, Any]]:
    """Return all rows as dictionaries by column name."""

    def run() -> list[dict[str, Any]]:
        with conn.cursor(row_factory=dict_row) as cursor:
            return cursor.execute(sql, conn.allowed | params).fetchall()

    return _again_on_conflict(conn, run)


def fetch_dicts_once(conn: Connection, sql: str, params: Params) -> list[dict[str, Any]]:
    """Return all rows as dictionaries by column name. Do not retry after a conflict."""
    with conn.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(sql, conn.allowed | params).fetchall()


def fetch_value(conn: Connection, sql: str, params: Params) -> Any:
    """Return the first column of the first row. Return None if there is no row."""

    def run() -> Any:
        with conn.cursor(row_factory=scalar_row) as cursor:
            return cursor.execute(sql, conn.allowed | params).fetchone()

    return _again_on_conflict(conn, run)


def execute(conn: Connection, sql: str, params: Params) -> int:
    """Run a statement. Return how many rows it affected."""
    return _again_on_conflict(conn, lambda: conn.execute(sql, conn.allowed | params).rowcount)
