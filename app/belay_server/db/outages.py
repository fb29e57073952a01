"""Which errors of Postgres are an outage: the server is not there, and waiting helps.

The driver's `OperationalError` is wider than that. It also covers a statement that can never
succeed (SQLSTATE class 54, "program limit exceeded"), and whoever waited for that would wait for
ever, on one client's behalf. So an outage is told by its SQLSTATE; see PostgreSQL's documentation,
appendix A.
"""

from __future__ import annotations

import psycopg

#: Connections broken or refused; the server shutting down, starting, or without its database.
_CLASSES = ("08", "57P")
_CODES = frozenset(
    {
        "53100",  # the disk is full
        "53300",  # too many connections
        "25006",  # read-only: a standby, or a server about to be replaced by one
        "25P03",  # the server ended a transaction that stood idle for too long
    }
)
#: What libpq says of a statement with too many parameters (65,535 are the most), or of a message
#: that is too large: errors of the driver's, without a SQLSTATE.
_NOT_SENT = ("number of parameters must be", "cannot allocate memory", "out of memory")
#: Two transactions were in each other's way, and this one was undone by the server.
CONFLICT = (
    psycopg.errors.SerializationFailure,
    psycopg.errors.DeadlockDetected,
    psycopg.errors.LockNotAvailable,
)


def is_outage(error: BaseException) -> bool:
    """True for an error that says nothing about the statement, and may be gone in a moment."""
    if not isinstance(error, psycopg.Error):
        return False
    if error.sqlstate is None:
        # The driver's own: the connection was lost, or there never was one.
        return isinstance(error, psycopg.OperationalError) and not _was_not_sent(error)
    return error.sqlstate.startswith(_CLASSES) or error.sqlstate in _CODES


def _was_not_sent(error: psycopg.Error) -> bool:
    """True for a statement that libpq has refused to send; the connection is still open."""
    text = str(error)
    return text.startswith("sending ") and any(words in text for words in _NOT_SENT)


def is_worth_waiting(error: BaseException) -> bool:
    """True for an outage, and for a conflict that lasts: the same statement may succeed later."""
    return is_outage(error) or isinstance(error, CONFLICT)


def is_unstorable(error: BaseException) -> bool:
    """True when the values are at fault: too large for Postgres (54) or for libpq, or not
    representable (22)."""
    if not isinstance(error, psycopg.Error):
        return False
    return (error.sqlstate or "").startswith(("22", "54")) or _was_not_sent(error)


def in_short(error: BaseException) -> str:
    """The error's first line, for a record that clients can read: no statement, no context."""
    text = error.diag.message_primary if isinstance(error, psycopg.Error) else None
    return (text or str(error)).strip().partition("\n")[0][:500]
