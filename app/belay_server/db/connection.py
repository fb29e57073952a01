"""Open connections and pools, run statements and transactions, and turn rows into dataclasses.

Every connection is in autocommit mode: one statement is one transaction, and several statements
need `in_transaction`. After a conflict with another transaction (a deadlock, a serialization
failure, a lock timeout) the statement or the whole transaction is retried here a few times; callers
do not notice. JSON is encoded by orjson, so a value is the same in a response, a column and an
event.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
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
from psycopg_pool.base import AttemptWithBackoff

from belay_server.db.connection_shares import ConnectionShares, Whose
from belay_server.db.hang_watch import HangWatch, Hung, waits_are_watched
from belay_server.db.outages import CONFLICT, in_short, is_unstorable, is_worth_waiting
from belay_server.domain.access import EVERYTHING, Access, necessary_path
from belay_server.domain.errors import Interrupted, InvalidRequest, TooMuch, Unavailable
from belay_server.runtime.turns import wait_for_turn

log = logging.getLogger(__name__)


class Connection(psycopg.Connection[Any]):
    """A connection with the filters of the caller's access.

    Statements that read resources for a client use them as the parameters `allowed_threads`,
    `allowed_assistants` and `allowed_crons`. Searches use `within_threads` and so on too: a weaker
    condition with an index, so that they do not read the metadata of all other callers.
    """

    allowed: dict[str, Any] = {  # noqa: RUF012  (it is never changed in place)
        "allowed_threads": None,
        "allowed_assistants": None,
        "allowed_crons": None,
        "within_threads": None,
        "within_assistants": None,
        "within_crons": None,
    }
    #: The size limit of a page of rows, in bytes; see `fetch_page`.
    most_bytes = 64 * 1024 * 1024
    #: Whether rows have been read one by one since the last `end_row_by_row_mode`.
    has_streamed = False


Params = dict[str, Any]
Row = TypeVar("Row")
_T = TypeVar("_T")

_AGAIN = tenacity.Retrying(
    retry=tenacity.retry_if_exception_type(CONFLICT),
    wait=tenacity.wait_random_exponential(multiplier=0.02, max=0.5),
    stop=tenacity.stop_after_attempt(8),
    reraise=True,
)
#: These timeouts detect a connection that was lost silently, as when the server loses power.
_NETWORK = {
    "connect_timeout": 5,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
}

#: How many seconds a request waits for a connection, and how many requests per connection may wait.
#: A wait for a server that does not respond ends earlier (`hang_watch`).
_POOL_SECONDS = 30.0
_POOL_QUEUE = 100
#: The same where no waits are watched.
_UNWATCHED_POOL_SECONDS = 5.0
#: How long a request first waits for its caller's other requests. A caller whose statements are
#: blocked learns so before Postgres ends the first of them.
_SHARE_SECONDS = 15.0
#: In bytes. Reading this much JSON takes about a millisecond.
_LARGE_ROW = 64 * 1024
#: The connect timeout of the probe that detects a hanging server. This is libpq's minimum.
_ANSWER_SECONDS = 2
#: How long a stalled writer may hold a row lock. Then Postgres ends its transaction.
_IDLE_IN_TRANSACTION_MS = 5_000


def _dumps(value: Any) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS)


def dump_json(value: Any) -> str:
    """Return a value as JSON text, encoded as for a column."""
    return _dumps(value).decode()


def connect(database_url: str, *, pgbouncer: bool = False, name: str = "belay") -> Connection:
    """Open one connection outside any pool. Raises OperationalError."""
    conn = Connection.connect(
        database_url, autocommit=True, application_name=name, **_network(database_url)
    )
    _configure(conn, pgbouncer=pgbouncer)
    return conn


def _network(database_url: str) -> dict[str, Any]:
    """Return Belay's network options, except those that the operator's URL sets."""
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
    on_wait: Callable[[float], None] = lambda _seconds: None,
) -> Pool:
    """Open a pool of at most `size` connections, which are opened on demand.

    A request is refused at once if too many others already wait, and ended if it waits for a server
    that hangs. Postgres ends a statement after `statement_seconds` (not with `pgbouncer`).
    `on_wait` is called with the seconds that each request has waited for its connection.
    """
    return Pool(
        database_url,
        min_size=1,
        max_size=size,
        timeout=_POOL_SECONDS if waits_are_watched() else _UNWATCHED_POOL_SECONDS,
        max_waiting=size * _POOL_QUEUE,
        open=True,
        connection_class=Connection,
        kwargs={"autocommit": True, "application_name": name, **_network(database_url)},
        configure=lambda conn: _configure(
            conn, pgbouncer=pgbouncer, most_bytes=most_bytes, statement_seconds=statement_seconds
        ),
        shares=ConnectionShares(size, whose, seconds=_SHARE_SECONDS),
        on_wait=on_wait,
    )


class QuickAttempt(AttemptWithBackoff):
    """An attempt to connect that is repeated after a second at the latest. The library doubles the
    delay without a limit: after repeated cuts, a pool would be without connections for longer than
    the outage."""

    INITIAL_DELAY = 0.1
    LONGEST_DELAY = 1.0

    def update_delay(self, now: float) -> None:
        super().update_delay(now)
        self.delay = min(self.delay, self.LONGEST_DELAY)


class Pool(ConnectionPool[Connection]):
    """A pool with shares per caller, whose waits and uses end when the server hangs."""

    def __init__(
        self,
        conninfo: str,
        *,
        shares: ConnectionShares,
        on_wait: Callable[[float], None],
        **kwargs: Any,
    ) -> None:
        self._shares = shares
        self._on_wait = on_wait
        self._hangs = HangWatch(partial(_answers, conninfo))
        super().__init__(conninfo, **kwargs)

    def getconn(self, timeout: float | None = None) -> Connection:
        """Return a connection that the server has not closed. The library's own check of that
        waits between two attempts, each time twice as long."""
        ends_at = time.monotonic() + (self.timeout if timeout is None else timeout)
        while True:
            conn = super().getconn(max(0.0, ends_at - time.monotonic()))
            if _is_open(conn):
                return conn
            self.putconn(conn)  # which opens another one

    def _add_connection(self, attempt: AttemptWithBackoff | None, growing: bool = False) -> None:
        quick = attempt or QuickAttempt(timeout=self.reconnect_timeout)
        super()._add_connection(quick, growing)

    @contextmanager
    def connection(
        self, timeout: float | None = None, caller: str | None = None
    ) -> Iterator[Connection]:
        """Yield a connection. Raises Unavailable if the server does not respond while the request
        waits for one, TooMany and the errors of the library's pool."""
        began = time.monotonic()
        with ExitStack() as stack:
            try:
                stack.enter_context(self._shares.hold(self._hangs.watched(None), caller))
                with self._hangs.watched(None):
                    conn = stack.enter_context(super().connection(timeout))
            except Hung as error:
                raise Unavailable() from error
            self._on_wait(time.monotonic() - began)
            stack.enter_context(self._hangs.watched(conn))
            yield conn


def _answers(database_url: str) -> bool:
    """Return whether the server responds to a new connection. A refusal is a response, too."""
    network = {**_network(database_url), "connect_timeout": _ANSWER_SECONDS}
    try:
        Connection.connect(database_url, application_name="belay probe", **network).close()
    except psycopg.OperationalError as error:
        return error.sqlstate is not None
    return True


def _is_open(conn: Connection) -> bool:
    """Return whether the server has not closed the connection.

    This reads what has already been received, without a round trip. The first read gets the
    server's message, the second one the end of the connection.
    """
    try:
        conn.pgconn.consume_input()
        conn.pgconn.consume_input()
    except psycopg.OperationalError:
        return False
    return True


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
        # There are few statements, and each is used again: prepare it at its second use.
        conn.prepare_threshold = 1
        conn.execute(f"SET idle_in_transaction_session_timeout = {_IDLE_IN_TRANSACTION_MS}")
        if statement_seconds is not None:
            conn.execute(f"SET statement_timeout = {int(statement_seconds * 1000)}")


class Database:
    """Gives the requests of a process connections from its pool."""

    def __init__(
        self, pool: Pool, *, access: Access = EVERYTHING, caller: str | None = None
    ) -> None:
        self.pool = pool
        #: The access of its callers. A request with limited access has a Database of its own.
        self.access = access
        self._caller = caller

    def confined(self, access: Access) -> Database:
        """Return a Database with the same pool and one request's access."""
        return Database(self.pool, access=access, caller=self._caller)

    def counted_for(self, caller: str | None) -> Database:
        """Return a Database whose connections count against this caller's share of the pool, also
        after its request has been answered, as those of streams do."""
        return Database(self.pool, access=self.access, caller=caller)

    @contextmanager
    def connection(self) -> Iterator[Connection]:
        """Yield a connection in autocommit mode. Raises Unavailable if there is none."""
        with (
            unavailable_when_unreachable(),
            self.pool.connection(caller=self._caller) as conn,
            restricted(conn, self.access),
        ):
            yield conn

    def transaction(self, work: Callable[[Connection], _T]) -> _T:
        """Run `work` in one transaction, which is committed when `work` returns.

        After a conflict all of it runs again. So `work` must have no effects outside the database.
        """
        with self.connection() as conn:
            return in_transaction(conn, lambda: work(conn))

    def close(self) -> None:
        self.pool.close()


@contextmanager
def restricted(conn: Connection, access: Access) -> Iterator[None]:
    """Restrict what the connection's statements find during the block."""
    if access is EVERYTHING:
        yield
        return
    conn.allowed = _allowed(access)
    try:
        yield
    finally:
        conn.allowed = Connection.allowed


def _allowed(access: Access) -> dict[str, Any]:
    filters = {"threads": access.threads, "assistants": access.assistants, "crons": access.crons}
    params: dict[str, Any] = {}
    for kind, filter_ in filters.items():
        params[f"allowed_{kind}"] = None if filter_ is None else Jsonb(dict(filter_))
        params[f"within_{kind}"] = necessary_path(filter_)
    return params


def while_unavailable(seconds: float) -> tenacity.Retrying:
    """Return a caller that retries a function while it raises Unavailable, for up to `seconds`."""
    return tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(Unavailable),
        wait=tenacity.wait_random_exponential(multiplier=0.1, max=2.0),
        stop=tenacity.stop_after_delay(seconds),
        reraise=True,
    )


@contextmanager
def unavailable_when_unreachable() -> Iterator[None]:
    """Turn the driver's errors into those of requests. This is the only place that does.

    Unavailable: there was no connection, or a statement timed out or failed. Interrupted: the
    connection was lost, or a conflict persisted. InvalidRequest: Postgres cannot store the client's
    values. Any other error is a defect of Belay and is raised as it is.
    """
    try:
        yield
    except (PoolTimeout, TooManyRequests) as error:
        message = "All connections to the database are in use. Nothing was accepted; try again."
        raise Unavailable(message) from error
    except psycopg.Error as error:
        if is_worth_waiting(error):
            raise Interrupted() from error
        if is_unstorable(error):
            log.warning("a request's values cannot be stored: %s", error)
            raise InvalidRequest(f"Postgres cannot store this: {in_short(error)}") from error
        if isinstance(error, psycopg.errors.QueryCanceled):
            log.warning("a statement exceeded its time limit: %s", error)
            raise Unavailable(
                "A statement took longer than BELAY_STATEMENT_SECONDS; request less at once"
            ) from error
        if isinstance(error, psycopg.OperationalError):
            log.exception("a statement failed")
            raise Unavailable(f"The database refused a statement: {in_short(error)}") from error
        raise


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


def fetch_value(conn: Connection, sql: str, params: Params) -> Any:
    """Return the first column of the first row. Return None if there is no row."""

    def run() -> Any:
        with conn.cursor(row_factory=scalar_row) as cursor:
            return cursor.execute(sql, conn.allowed | params).fetchone()

    return _again_on_conflict(conn, run)


def execute(conn: Connection, sql: str, params: Params) -> int:
    """Run a statement. Return how many rows it affected."""
    return _again_on_conflict(conn, lambda: conn.execute(sql, conn.allowed | params).rowcount)
