"""Open connections to Postgres, with Belay's network options, JSON encoding and timeouts.

Every connection is in autocommit mode: one statement is one transaction, and several statements
need `in_transaction`. JSON is encoded by orjson, so a value is the same in a response, a column and
an event.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import orjson
import psycopg
from psycopg.conninfo import conninfo_to_dict
from psycopg.types.json import Jsonb, set_json_dumps, set_json_loads

from belay_server.domain.access import EVERYTHING, Access, necessary_path

#: These timeouts detect a connection that was lost silently, as when the server loses power.
_NETWORK = {
    "connect_timeout": 5,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
}
#: How long a stalled writer may hold a row lock. Then Postgres ends its transaction.
_IDLE_IN_TRANSACTION_MS = 5_000


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


def _dumps(value: Any) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS)


def dump_json(value: Any) -> str:
    """Return a value as JSON text, encoded as for a column."""
    return _dumps(value).decode()


def connect(database_url: str, *, pgbouncer: bool = False, name: str = "belay") -> Connection:
    """Open one connection outside any pool. Raises OperationalError."""
    conn = Connection.connect(
        database_url, autocommit=True, application_name=name, **network_options(database_url)
    )
    configure(conn, pgbouncer=pgbouncer)
    return conn


def network_options(database_url: str) -> dict[str, Any]:
    """Return Belay's network options, except those that the operator's URL sets."""
    set_there = conninfo_to_dict(database_url)
    return {name: value for name, value in _NETWORK.items() if name not in set_there}


def configure(
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
