"""Test that an outage is recognized by its SQLSTATE; any other error is the statement's own."""

from __future__ import annotations

import psycopg
import pytest

from belay_server.db.postgres.outages import is_outage, is_unstorable, is_worth_waiting
from belay_server.db.postgres.pool import unavailable_when_unreachable
from belay_server.db.postgres.reconnecting import ReconnectingConnection
from belay_server.domain.errors import Interrupted, InvalidRequest, Unavailable

E = psycopg.errors
OUTAGES = [
    psycopg.OperationalError,
    E.ConnectionFailure,
    E.AdminShutdown,
    E.CannotConnectNow,
    E.TooManyConnections,
    E.DiskFull,
    E.ReadOnlySqlTransaction,
    E.IdleInTransactionSessionTimeout,
]
CONFLICTS = [E.SerializationFailure, E.DeadlockDetected, E.LockNotAvailable]
UNSTORABLE = [E.ProgramLimitExceeded, E.StatementTooComplex, E.UntranslatableCharacter]
OF_THE_STATEMENT = [*UNSTORABLE, E.OutOfMemory, E.QueryCanceled, E.UniqueViolation, E.IoError]


@pytest.mark.parametrize("error", OUTAGES)
def test_an_outage_is_worth_waiting_for(error):
    assert is_outage(error()) and is_worth_waiting(error())


@pytest.mark.parametrize("error", CONFLICTS)
def test_a_conflict_is_not_an_outage_but_is_worth_waiting_for(error):
    assert is_worth_waiting(error()) and not is_outage(error())


@pytest.mark.parametrize("error", [*OF_THE_STATEMENT, ValueError])
def test_an_error_of_the_statement_itself_is_not_worth_waiting_for(error):
    assert not is_outage(error()) and not is_worth_waiting(error())


@pytest.mark.parametrize("error", UNSTORABLE)
def test_a_value_that_cannot_be_stored_is_an_invalid_request(error):
    assert is_unstorable(error())
    with pytest.raises(InvalidRequest, match="cannot store"), unavailable_when_unreachable():
        raise error("too long")


@pytest.mark.parametrize("error", [*OUTAGES, *CONFLICTS])
def test_an_outage_in_a_request_is_a_503(error):
    with pytest.raises(Interrupted), unavailable_when_unreachable():
        raise error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (E.OutOfMemory, "refused a statement: no"),
        (E.QueryCanceled, "longer than BELAY_STATEMENT_SECONDS"),
    ],
)
def test_a_statement_that_postgres_refuses_is_503_with_the_reason(error, words):
    with pytest.raises(Unavailable, match=words), unavailable_when_unreachable():
        raise error("no")


@pytest.mark.parametrize("error", OF_THE_STATEMENT)
def test_a_child_does_not_retry_a_statement_that_cannot_succeed(error):
    class Open:
        closed = True

        def close(self) -> None: ...

    tries = []

    def work(_conn):
        tries.append(1)
        raise error("never")

    with pytest.raises(error):
        ReconnectingConnection(Open).run(work, keep_waiting=lambda: True)
    assert tries == [1]


@pytest.mark.parametrize(
    "words",
    [
        "sending query failed: number of parameters must be between 0 and 65535",
        "sending query failed: cannot allocate memory for output buffer",
    ],
)
def test_a_statement_that_libpq_cannot_send_is_not_an_outage(words):
    error = psycopg.OperationalError(words)
    assert not is_outage(error)
    assert is_unstorable(error)
    assert is_outage(psycopg.OperationalError("sending query failed: no connection to the server"))
