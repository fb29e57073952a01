"""Test a connection that retries its work while the server is unavailable."""

from __future__ import annotations

import psycopg
import pytest
from psycopg.pq import TransactionStatus

from belay_server.db.postgres.reconnecting import ReconnectingConnection


class FakeInfo:
    transaction_status = TransactionStatus.IDLE


class FakeConnection:
    def __init__(self) -> None:
        self.closed = False
        self.info = FakeInfo()

    def close(self) -> None:
        self.closed = True


class Server:
    """A server whose first connections and statements fail."""

    def __init__(self, refuse: int = 0, fail: int = 0, error=psycopg.OperationalError) -> None:
        self.refuse, self.fail, self.error = refuse, fail, error
        self.opened: list[FakeConnection] = []

    def connect(self):
        if self.refuse:
            self.refuse -= 1
            raise psycopg.OperationalError("connection refused")
        self.opened.append(FakeConnection())
        return self.opened[-1]

    def work(self, conn):
        if self.fail:
            self.fail -= 1
            raise self.error("not now")
        return conn


def always() -> bool:
    return True


@pytest.mark.parametrize(
    "error",
    [
        psycopg.OperationalError,
        psycopg.errors.AdminShutdown,
        psycopg.errors.SerializationFailure,
        psycopg.errors.ReadOnlySqlTransaction,
    ],
)
def test_work_is_retried_until_it_succeeds(error):
    server = Server(refuse=2, fail=2, error=error)
    patient = ReconnectingConnection(server.connect)
    assert patient.run(server.work, keep_waiting=always) is server.opened[-1]
    assert patient.run(server.work, keep_waiting=always) is server.opened[-1]


def test_retries_end_on_request_with_the_last_error():
    server = Server(fail=100)
    left = iter([True, True, False])
    with pytest.raises(psycopg.OperationalError, match="not now"):
        ReconnectingConnection(server.connect).run(server.work, keep_waiting=lambda: next(left))
    assert server.fail == 97


def test_an_error_of_the_work_itself_is_not_retried():
    server = Server(fail=1, error=psycopg.errors.CheckViolation)
    with pytest.raises(psycopg.errors.CheckViolation):
        ReconnectingConnection(server.connect).run(server.work, keep_waiting=always)


def test_a_connection_in_a_failed_transaction_is_dropped():
    server = Server()
    patient = ReconnectingConnection(server.connect)
    first = patient.get()

    def work(conn):
        if conn is first:
            conn.info.transaction_status = TransactionStatus.INERROR
            raise psycopg.OperationalError("cut")
        return conn

    assert patient.run(work, keep_waiting=always) is not first
    assert first.closed
