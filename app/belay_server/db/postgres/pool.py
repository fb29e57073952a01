"""Share the connections of a process between its requests.

A pool opens connections on demand. A request waits for one, within its caller's share, and is ended
if the server hangs. The errors of the driver become those of requests here.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

import psycopg
import tenacity
from psycopg_pool import ConnectionPool, PoolTimeout, TooManyRequests
from psycopg_pool.base import AttemptWithBackoff

from belay_server.db.postgres.connection import (
    Connection,
    configure,
    network_options,
    restricted,
)
from belay_server.db.postgres.connection_shares import ConnectionShares, Whose
from belay_server.db.postgres.hang_watch import HangWatch, Hung, waits_are_watched
from belay_server.db.postgres.outages import in_short, is_unstorable, is_worth_waiting
from belay_server.db.postgres.statements import in_transaction
from belay_server.domain.access import EVERYTHING, Access
from belay_server.domain.errors import Interrupted, InvalidRequest, Unavailable

log = logging.getLogger(__name__)

_T = TypeVar("_T")

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
#: The connect timeout of the probe that detects a hanging server. This is libpq's minimum.
_ANSWER_SECONDS = 2


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
        kwargs={"autocommit": True, "application_name": name, **network_options(database_url)},
        configure=lambda conn: configure(
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
    network = {**network_options(database_url), "connect_timeout": _ANSWER_SECONDS}
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
