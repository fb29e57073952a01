"""Keep a process's single connection open, and retry its work while Postgres is unavailable."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import psycopg
import tenacity
from psycopg.pq import TransactionStatus

from belay_server.db.postgres.connection import Connection
from belay_server.db.postgres.outages import is_worth_waiting

log = logging.getLogger(__name__)

_T = TypeVar("_T")


class ReconnectingConnection:
    """A connection that is opened at its first use, and again after it was lost."""

    def __init__(self, connect: Callable[[], Connection]) -> None:
        self._connect = connect
        self._conn: Connection | None = None

    def get(self) -> Connection:
        """Return the open connection. Raises OperationalError if Postgres is unavailable."""
        if self._conn is None or self._conn.closed:
            self._conn = self._connect()
        return self._conn

    def run(self, work: Callable[[Connection], _T], *, keep_waiting: Callable[[], bool]) -> _T:
        """Run `work`, and retry it with backoff after an outage while `keep_waiting` returns True.

        If the connection is lost, the work may or may not have been done. So `work` must be
        idempotent. Raises the outage's error when `keep_waiting` returns False, and any other error
        at once.
        """
        try:
            return work(self.get())
        except psycopg.Error as error:
            self._drop_if_unusable()
            if not is_worth_waiting(error) or not keep_waiting():
                raise
            log.warning("Postgres is unavailable, retrying: %s", error)
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(is_worth_waiting),
            wait=tenacity.wait_random_exponential(multiplier=0.05, max=1.0),
            stop=lambda _state: not keep_waiting(),
            after=lambda _state: self._drop_if_unusable(),
            reraise=True,
        )
        return retrying(lambda: work(self.get()))

    def drop(self) -> None:
        """Close the connection. The next use opens another one."""
        if self._conn is not None:
            with suppress(psycopg.Error):
                self._conn.close()
            self._conn = None

    def _drop_if_unusable(self) -> None:
        """Close a connection that is broken or still in a transaction after an error."""
        conn = self._conn
        if conn is None:
            return
        if conn.closed or conn.info.transaction_status is not TransactionStatus.IDLE:
            self.drop()
