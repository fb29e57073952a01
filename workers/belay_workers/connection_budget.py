"""The connections to Postgres that a worker needs, and those that Postgres allows."""

from __future__ import annotations

import logging

import psycopg

from belay_server.configuration.settings import SettingsError
from belay_server.db.postgres.connection import connect
from belay_server.db.postgres.outages import is_outage
from belay_server.db.postgres.statements import fetch_value
from belay_workers.application import Belay, refuse_to_start

log = logging.getLogger(__name__)

#: Connections of the parent's own threads, besides one per child.
_OWN_CONNECTIONS = 4
#: The connections that Postgres reserves for superusers are subtracted.
_ALLOWED_CONNECTIONS = """
SELECT current_setting('max_connections')::int
     - current_setting('superuser_reserved_connections')::int
"""


def refuse_too_many_connections(app: Belay, concurrency: int) -> None:
    """Exit if Postgres allows fewer connections than the worker needs.

    The children would otherwise take all connections, and none would be left to renew leases or to
    read cancels with. There is no check behind PgBouncer, or while Postgres is unavailable.
    """
    needed = _processes(app, concurrency) + _OWN_CONNECTIONS
    limit = app.allowed_connections = _allowed_connections(app)
    if limit is not None and needed > limit and not app.settings.pgbouncer:
        refuse_to_start(
            SettingsError(
                f"{concurrency} runs at once need {needed} connections to Postgres, which allows "
                f"{limit}: raise its max_connections, or lower BELAY_CONCURRENCY"
            )
        )


def log_connections(app: Belay, concurrency: int) -> None:
    """Log at the start how many connections the worker uses and how many Postgres allows."""
    limit = app.allowed_connections
    log.info(
        "this worker is %s; it uses up to %d connections to Postgres (%d children and hosts, %d of "
        "its own), each web process up to %d; the server allows %s",
        app.owner,
        _processes(app, concurrency) + _OWN_CONNECTIONS,
        _processes(app, concurrency),
        _OWN_CONNECTIONS,
        app.settings.web_pool_size,
        "an unknown number" if limit is None else limit,
    )


def _processes(app: Belay, concurrency: int) -> int:
    """Return how many processes of this worker may execute runs, each with a connection."""
    return concurrency - app.placement.hosted_runs + app.placement.hosts


def _allowed_connections(app: Belay) -> int | None:
    """Return how many connections Postgres allows; None while it is unavailable."""
    try:
        with connect(app.settings.database_url, name="belay start") as conn:
            return int(fetch_value(conn, _ALLOWED_CONNECTIONS, {}))
    except psycopg.Error as error:
        if not is_outage(error):
            raise
        log.warning(
            "cannot read Postgres's connection limit; starting without the check: %s", error
        )
        return None
