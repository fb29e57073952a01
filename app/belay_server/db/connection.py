"""Connections to Postgres: how one is opened, how a pool is, and how rows become dataclasses.

Every connection is in autocommit mode: one statement is one transaction, and several take
`in_transaction`. What loses a conflict with another transaction (a deadlock, a serialization
failure, a lock not had in time) is done again here, a few times, by the statement or by the whole
transaction; nobody above hears of it. JSON goes through orjson, so a value is the same on the wire,
in a column and in an event.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import partial
from typing import Any, TypeVar, cast

import orjson
import psycopg
import tenacity
from psycopg.conninfo import conninfo_to_dict
from psycopg.pq import TransactionStatus
from psycopg.rows import dict_row, scalar_row
from psycopg.types.json import Jsonb, set_json_dumps, set_json_loads
from psycopg_pool import ConnectionPool, PoolTimeout, TooManyRequests

from belay_server.db.connection_shares import ConnectionShares, Whose
from belay_server.db.hang_watch import HangWatch
from belay_server.db.outages import CONFLICT, in_short, is_unstorable, is_worth_waiting
from belay_server.domain.access import EVERYTHING, Access
from belay_server.domain.errors import Interrupted, InvalidRequest, TooMuch, Unavailable

log = logging.getLogger(__name__)


class Connection(psycopg.Connection[Any]):
    """Knows what whoever asks may see: the statements that find something for a client take it as
    `allowed_threads`, `allowed_assistants` and `allowed_crons`."""

    allowed: dict[str, Any] = {  # noqa: RUF012  (nobody writes into it)
        "allowed_threads": None,
        "allowed_assistants": None,
        "allowed_crons": None,
    }
    #: What a page of rows may have, in bytes; see `fetch_page`.
    most_bytes = 64 * 1024 * 1024


Params = dict[str, Any]
Row = TypeVar("Row")
_T = TypeVar("_T")

_AGAIN = tenacity.Retrying(
    retry=tenacity.retry_if_exception_type(CONFLICT),
    wait=tenacity.wait_random_exponential(multiplier=0.02, max=0.5),
    stop=tenacity.stop_after_attempt(8),
    reraise=True,
)
#: A server that went away without a word (a machine that lost power, a cable) is noticed.
_NETWORK = {
    "connect_timeout": 5,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
}

#: How long a request waits for a connection, and how many per connection may wait.
_POOL_SECONDS = 5.0
_POOL_QUEUE = 100
#: How long it waits for its caller's other requests first. Longer than it takes to see that the
#: server hangs, which is said then.
_SHARE_SECONDS = 8.0
#: Reading this much JSON takes about a millisecond.
_LARGE_ROW = 64 * 1024
#: How long a server that is asked whether it answers has for it; libpq takes no less.
_ANSWER_SECONDS = 2
#: What a stalled writer may hold a row lock for before the server ends its transaction.
_IDLE_IN_TRANSACTION_MS = 5_000


def _dumps(value: Any) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS)


def dump_json(value: Any) -> str:
    """JSON as text, as any column gets it."""
    return _dumps(value).decode()


def connect(database_url: str, *, pgbouncer: bool = False, name: str = "belay") -> Connection:
    """One connection outside any pool."""
    conn = Connection.connect(
        database_url, autocommit=True, application_name=name, **_network(database_url)
    )
    _configure(conn, pgbouncer=pgbouncer)
    return conn


def _network(database_url: str) -> dict[str, Any]:
    """Our network options, but for those the operator's URL sets."""
    set_there = conninfo_to_dict(database_url)
    return {name: value for name, value in _NETWORK.items() if name not in set_there}


def open_pool(
    database_url: str,
    *,
    size: int,
    pgbouncer: bool,
    name: str,
    most_bytes: int = Connection.most_bytes,
    statement_seconds: float | None = None,
    whose: Whose = lambda: None,
) -> ConnectionPool[Connection]:
    """A pool that opens connections as they are needed, `size` at most.

    A request that would have to wait behind too many others is refused at once, and one that waits
    for a server that hangs is ended. The server ends a statement after `statement_seconds`.
    """
    return _Pool(
        database_url,
        min_size=1,
        max_size=size,
        timeout=_POOL_SECONDS,
        max_waiting=size * _POOL_QUEUE,
        open=True,
        connection_class=Connection,
        kwargs={"autocommit": True, "application_name": name, **_network(database_url)},
        configure=lambda conn: _configure(
            conn, pgbouncer=pgbouncer, most_bytes=most_bytes, statement_seconds=statement_seconds
        ),
        check=_refuse_closed,
        shares=ConnectionShares(size, whose, seconds=_SHARE_SECONDS),
    )


class _Pool(ConnectionPool[Connection]):
    def __init__(self, conninfo: str, *, shares: ConnectionShares, **kwargs: Any) -> None:
        self._shares = shares
        self._hangs = HangWatch(partial(_answers, conninfo))
        super().__init__(conninfo, **kwargs)

    @contextmanager
    def connection(self, timeout: float | None = None) -> Iterator[Connection]:
        with (
            self._shares.hold(self._hangs.watched(None)),
            super().connection(timeout) as conn,
            self._hangs.watched(conn),
        ):
            yield conn


def _answers(database_url: str) -> bool:
    """Whether the server says anything at all to somebody new, a refusal included."""
    network = {**_network(database_url), "connect_timeout": _ANSWER_SECONDS}
    try:
        Connection.connect(database_url, application_name="belay probe", **network).close()
    except psycopg.OperationalError as error:
        return error.sqlstate is not None
    return True


def _refuse_closed(conn: Connection) -> None:
    """A server that ended a connection has said so by now: look at what has come, without a round
    trip. What it said takes one look, that it closed takes the next. Raises OperationalError."""
    conn.pgconn.consume_input()
    conn.pgconn.consume_input()


def _configure(
    conn: Connection,
    *,
    pgbouncer: bool,
    most_bytes: int = Connection.most_bytes,
    statement_seconds: float | None = None,
) -> None:
    conn.most_bytes = most_bytes
    set_json_dumps(_dumps, conn)
    set_json_loads(orjson.loads, conn)
    if pgbouncer:
        conn.prepare_threshold = None
    else:
        # The statements are few, and each comes back: prepared at its second use.
        conn.prepare_threshold = 1
        conn.execute(f"SET idle_in_transaction_session_timeout = {_IDLE_IN_TRANSACTION_MS}")
        if statement_seconds is not None:
            conn.execute(f"SET statement_timeout = {int(statement_seconds * 1000)}")


class Database:
    """The pool of a process that serves many requests; hands out one connection at a time."""

    def __init__(self, pool: ConnectionPool[Connection]) -> None:
        self.pool = pool
        #: What may be seen through it. A request that is confined has a Database of its own.
        self.access = EVERYTHING

    def confined(self, access: Access) -> Database:
        """The same pool, for one request."""
        mine = Database(self.pool)
        mine.access = access
        return mine

    @contextmanager
    def connection(self) -> Iterator[Connection]:
        """A connection in autocommit mode. Raises Unavailable when none can be had."""
        with unavailable_when_unreachable(), self.pool.connection() as conn:
            if self.access is EVERYTHING:
                yield conn
                return
            conn.allowed = _allowed(self.access)
            try:
                yield conn
            finally:
                conn.allowed = Connection.allowed

    def transaction(self, work: Callable[[Connection], _T]) -> _T:
        """Run `work` in one transaction: committed at its return, or not at all. It is done again
        from the start after a conflict, so it may do nothing that cannot be undone."""
        with self.connection() as conn:
            return in_transaction(conn, lambda: work(conn))

    def close(self) -> None:
        self.pool.close()


def _allowed(access: Access) -> dict[str, Any]:
    filters = {
        "allowed_threads": access.threads,
        "allowed_assistants": access.assistants,
        "allowed_crons": access.crons,
    }
    return {
        name: None if filter_ is None else Jsonb(dict(filter_)) for name, filter_ in filters.items()
    }


def while_unavailable(seconds: float) -> tenacity.Retrying:
    """Calls a function again for as long as it raises Unavailable, up to `seconds`."""
    return tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(Unavailable),
        wait=tenacity.wait_random_exponential(multiplier=0.1, max=2.0),
        stop=tenacity.stop_after_delay(seconds),
        reraise=True,
    )


@contextmanager
def unavailable_when_unreachable() -> Iterator[None]:
    """Turn the driver's errors into the API's, at this one border.

    Unavailable: no connection was to be had. Interrupted: there was one, and the database went away
    or was in a conflict that lasted. InvalidRequest: Postgres cannot store these values, which are
    the client's. Every other error is a defect of ours and passes.
    """
    try:
        yield
    except (PoolTimeout, TooManyRequests) as error:
        raise Unavailable() from error
    except psycopg.Error as error:
        if is_worth_waiting(error):
            raise Interrupted() from error
        if is_unstorable(error):
            log.warning("a request's values cannot be stored: %s", error)
            raise InvalidRequest(f"Postgres cannot store this: {in_short(error)}") from error
        if isinstance(error, psycopg.errors.QueryCanceled):
            log.warning("a statement took too long: %s", error)
            raise Unavailable(
                "The database took longer than BELAY_STATEMENT_SECONDS; ask for less at once"
            ) from error
        if isinstance(error, psycopg.OperationalError):
            log.exception("a statement failed")
            raise Unavailable(f"The database refused: {in_short(error)}") from error
        raise


def in_transaction(conn: Connection, work: Callable[[], _T]) -> _T:
    """Run `work` in one transaction on this connection, again after a conflict."""

    def once() -> _T:
        with conn.transaction():
            return work()

    return _again_on_conflict(conn, once)


def _again_on_conflict(conn: Connection, work: Callable[[], _T]) -> _T:
    """Part of a transaction cannot be done again by itself: the whole of it will be."""
    if conn.info.transaction_status is not TransactionStatus.IDLE:
        return work()
    return again_on_conflict(work)


def again_on_conflict(work: Callable[[], _T]) -> _T:
    """Do what may be done twice, again for as long as it loses conflicts, a few times."""
    with suppress(*CONFLICT):
        return work()
    return _AGAIN(work)


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
    def run() -> Row | None:
        with conn.cursor(row_factory=_fields_of(row)) as cursor:
            return cursor.execute(sql, conn.allowed | params).fetchone()

    return _again_on_conflict(conn, run)


def fetch_all(conn: Connection, sql: str, params: Params, row: type[Row]) -> list[Row]:
    def run() -> list[Row]:
        with conn.cursor(row_factory=_fields_of(row)) as cursor:
            return cursor.execute(sql, conn.allowed | params).fetchall()

    return _again_on_conflict(conn, run)


def fetch_page(conn: Connection, sql: str, params: Params, row: type[Row]) -> list[Row]:
    """The same for rows that clients have filled, and may ask for a thousand of: they come one by
    one, and no more of them than `most_bytes` are ever held, the first in any case.

    Raises TooMuch.
    """

    def run() -> list[Row]:
        found: list[Row] = []
        size = 0
        with (
            conn.cursor(row_factory=_fields_of(row)) as cursor,
            closing(cast(Generator[Row], cursor.stream(sql, conn.allowed | params))) as rows,
        ):
            for one in rows:
                found.append(one)
                row_bytes = _bytes_of_row(cursor)
                size += row_bytes
                if row_bytes > _LARGE_ROW:
                    time.sleep(0)  # many of them: other requests have their turn
                if size > conn.most_bytes and len(found) > 1:
                    raise TooMuch(conn.most_bytes)
        return found

    return _again_on_conflict(conn, run)


def _bytes_of_row(cursor: psycopg.Cursor[Any]) -> int:
    """Of the one row that has just come."""
    result = cursor.pgresult
    if result is None:
        return 0
    return sum(len(result.get_value(0, column) or b"") for column in range(result.nfields))


def fetch_dicts(conn: Connection, sql: str, params: Params) -> list[dict[str, Any]]:
    def run() -> list[dict[str, Any]]:
        with conn.cursor(row_factory=dict_row) as cursor:
            return cursor.execute(sql, conn.allowed | params).fetchall()

    return _again_on_conflict(conn, run)


def fetch_value(conn: Connection, sql: str, params: Params) -> Any:
    def run() -> Any:
        with conn.cursor(row_factory=scalar_row) as cursor:
            return cursor.execute(sql, conn.allowed | params).fetchone()

    return _again_on_conflict(conn, run)


def execute(conn: Connection, sql: str, params: Params) -> int:
    """Run a statement; returns how many rows it touched."""
    return _again_on_conflict(conn, lambda: conn.execute(sql, conn.allowed | params).rowcount)
