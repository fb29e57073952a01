"""Connections to Postgres: how one is opened, how a pool is, and how rows become dataclasses.

Every connection is in autocommit mode: one statement is one transaction, and several take
`with transaction(conn):`. JSON goes through orjson, so a value is the same on the wire, in a
column and in an event.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import orjson
import psycopg
from psycopg.rows import dict_row, scalar_row
from psycopg.types.json import set_json_dumps, set_json_loads
from psycopg_pool import ConnectionPool, PoolTimeout

from app.domain.errors import Unavailable

Connection = psycopg.Connection[Any]
Params = Mapping[str, Any]
Row = TypeVar("Row")

#: What a stalled writer may hold a row lock for before the server ends its transaction.
_IDLE_IN_TRANSACTION_MS = 5_000


def _dumps(value: Any) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS)


def connect(database_url: str, *, pgbouncer: bool = False, name: str = "belay") -> Connection:
    """One connection outside any pool."""
    conn: Connection = psycopg.connect(
        database_url, autocommit=True, connect_timeout=5, application_name=name
    )
    _configure(conn, pgbouncer=pgbouncer)
    return conn


def open_pool(database_url: str, *, size: int, pgbouncer: bool, name: str) -> ConnectionPool:
    """A pool that opens connections as they are needed, `size` at most."""
    return ConnectionPool(
        database_url,
        min_size=1,
        max_size=size,
        timeout=5.0,
        open=True,
        kwargs={"autocommit": True, "connect_timeout": 5, "application_name": name},
        configure=lambda conn: _configure(conn, pgbouncer=pgbouncer),
        check=ConnectionPool.check_connection,
    )


def _configure(conn: Connection, *, pgbouncer: bool) -> None:
    set_json_dumps(_dumps, conn)
    set_json_loads(orjson.loads, conn)
    if pgbouncer:
        conn.prepare_threshold = None
    else:
        conn.execute(f"SET idle_in_transaction_session_timeout = {_IDLE_IN_TRANSACTION_MS}")


class Database:
    """The pool of a process that serves many requests; hands out one connection at a time."""

    def __init__(self, pool: ConnectionPool) -> None:
        self.pool = pool

    @contextmanager
    def connection(self) -> Iterator[Connection]:
        """A connection in autocommit mode. Raises Unavailable when none can be had."""
        with unavailable_when_unreachable(), self.pool.connection() as conn:
            yield conn

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """A connection inside one transaction: committed at the end, or not at all."""
        with self.connection() as conn, conn.transaction():
            yield conn

    def close(self) -> None:
        self.pool.close()


@contextmanager
def unavailable_when_unreachable() -> Iterator[None]:
    """The one border where driver errors that mean "no database" become Unavailable."""
    try:
        yield
    except (PoolTimeout, psycopg.OperationalError) as error:
        if isinstance(error, psycopg.errors.QueryCanceled):
            raise
        raise Unavailable() from error


def _fields_of(row: type[Row]) -> Callable[[psycopg.Cursor[Any]], Callable[[Sequence[Any]], Row]]:
    """A row factory that fills a dataclass by column name and ignores columns it does not have."""
    names = [field.name for field in dataclasses.fields(row)]  # type: ignore[arg-type]

    def factory(cursor: psycopg.Cursor[Any]) -> Callable[[Sequence[Any]], Row]:
        columns = {c.name: i for i, c in enumerate(cursor.description or ())}
        if not columns:
            return lambda values: row(*values)
        pick = [columns[name] for name in names]
        return lambda values: row(*[values[i] for i in pick])

    return factory


def fetch_one(conn: Connection, sql: str, params: Params, row: type[Row]) -> Row | None:
    with conn.cursor(row_factory=_fields_of(row)) as cursor:
        return cursor.execute(sql, params).fetchone()


def fetch_all(conn: Connection, sql: str, params: Params, row: type[Row]) -> list[Row]:
    with conn.cursor(row_factory=_fields_of(row)) as cursor:
        return cursor.execute(sql, params).fetchall()


def fetch_dicts(conn: Connection, sql: str, params: Params) -> list[dict[str, Any]]:
    with conn.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(sql, params).fetchall()


def fetch_value(conn: Connection, sql: str, params: Params) -> Any:
    with conn.cursor(row_factory=scalar_row) as cursor:
        return cursor.execute(sql, params).fetchone()


def execute(conn: Connection, sql: str, params: Params) -> int:
    """Run a statement; returns how many rows it touched."""
    return conn.execute(sql, params).rowcount
