"""Decide which errors of Postgres are outages: the server is unavailable, and a retry may succeed.

The driver's `OperationalError` is wider than that. It also covers a statement that can never
succeed (SQLSTATE class 54, "program limit exceeded"); retrying it would never end. So an outage is
recognized by its SQLSTATE; see PostgreSQL's documentation, appendix A.
"""

from __future__ import annotations

import psycopg

#: Connection lost or refused; the server shutting down, starting, or without its database.
_CLASSES = ("08", "57P")
_CODES = frozenset(
    {
        "53100",  # the disk is full
        "53300",  # too many connections
        "25006",  # read-only: a standby, or a server about to be replaced by one
        "25P03",  # the server ended a transaction that was idle for too long
    }
)
#: libpq's messages for a statement with too many parameters (more than 65,535) or a message that is
#: too large. These errors come from the driver and have no SQLSTATE.
_NOT_SENT = ("number of parameters must be", "cannot allocate memory", "out of memory")
#: Two transactions were in conflict, and the server rolled this one back.
CONFLICT = (
    psycopg.errors.SerializationFailure,
    psycopg.errors.DeadlockDetected,
    psycopg.errors.LockNotAvailable,
)


def is_outage(error: BaseException) -> bool:
    """Return whether an error is temporary and not caused by the statement."""
    if not isinstance(error, psycopg.Error):
        return False
    if error.sqlstate is None:
        # The driver's own error: the connection was lost or could not be opened.
        return isinstance(error, psycopg.OperationalError) and not _was_not_sent(error)
    return error.sqlstate.startswith(_CLASSES) or error.sqlstate in _CODES


def _was_not_sent(error: psycopg.Error) -> bool:
    """Return whether libpq refused to send the statement. The connection is then still open."""
    text = str(error)
    return text.startswith("sending ") and any(words in text for words in _NOT_SENT)


def is_worth_waiting(error: BaseException) -> bool:
    """Return whether the same statement may succeed later: after an outage or a conflict."""
    return is_outage(error) or isinstance(error, CONFLICT)


def is_unstorable(error: BaseException) -> bool:
    """Return whether the values caused the error.

    They are too large for Postgres (class 54) or libpq, or cannot be represented (class 22).
    """
    if not isinstance(error, psycopg.Error):
        return False
    return (error.sqlstate or "").startswith(("22", "54")) or _was_not_sent(error)


def in_short(error: BaseException) -> str:
    """Return the error's first line, without statement or context, as clients may read it."""
    text = error.diag.message_primary if isinstance(error, psycopg.Error) else None
    return (text or str(error)).strip().partition("\n")[0][:500]
