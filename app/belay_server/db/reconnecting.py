"""A process's one connection, and the patience to wait until Postgres is there again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import psycopg
import tenacity
from psycopg.pq import TransactionStatus

from belay_server.db.connection import Connection
from belay_server.db.outages import is_worth_waiting

log = logging.getLogger(__name__)

_T = TypeVar("_T")


class ReconnectingConnection:
    """Opened when it is first needed, and again whenever it was lost."""

    def __init__(self, connect: Callable[[], Connection]) -> None:
        self._connect = connect
        self._conn: Connection | None = None

    def get(self) -> Connection:
        """Raises OperationalError when Postgres cannot be reached."""
        if self._conn is None or self._conn.closed:
            self._conn = self._connect()
        return self._conn

    def run(self, work: Callable[[Connection], _T], *, keep_waiting: Callable[[], bool]) -> _T:
        """Run `work` until Postgres lets it, with backoff, for as long as `keep_waiting` says.

        An answer that was lost does not tell whether the work was done, so `work` must be such that
        doing it twice is doing it once. Raises the outage's error when there is no more waiting,
        and at once what waiting does not help: an error of the statement itself.
        """
        try:
            return work(self.get())
        except psycopg.Error as error:
            self._drop_if_spoilt()
            if not is_worth_waiting(error) or not keep_waiting():
                raise
            log.warning("Postgres is away, waiting for it: %s", error)
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(is_worth_waiting),
            wait=tenacity.wait_random_exponential(multiplier=0.05, max=1.0),
            stop=lambda _state: not keep_waiting(),
            after=lambda _state: self._drop_if_spoilt(),
            reraise=True,
        )
        return retrying(lambda: work(self.get()))

    def drop(self) -> None:
        if self._conn is not None:
            with suppress(psycopg.Error):
                self._conn.close()
            self._conn = None

    def _drop_if_spoilt(self) -> None:
        """After an error: a connection in the middle of something is of no use."""
        conn = self._conn
        if conn is None:
            return
        if conn.closed or conn.info.transaction_status is not TransactionStatus.IDLE:
            self.drop()
