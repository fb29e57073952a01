"""Forward-only migrations: numbered SQL files, then LangGraph's own checkpoint tables.

Run by `belay migrate` (the release process). Each file is one transaction under one advisory
lock, so two releases at once do no harm, and with timeouts, so a migration that cannot get its
locks fails instead of stopping the traffic.
"""

from __future__ import annotations

import time
from importlib.resources import files

import psycopg

from app.db.connection import OUTAGE, Connection, connect, fetch_value

_LOCK = 7_235_116
_TABLE = """
CREATE TABLE IF NOT EXISTS belay_migration (
    number     integer PRIMARY KEY,
    name       text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now()
)
"""


class SchemaNotReady(Exception):
    """The database's schema is older than this code; run `belay migrate`."""


def migrations() -> list[tuple[int, str, str]]:
    """(number, file name, SQL) of every migration, in order."""
    folder = files("app.db") / "migrations"
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".sql"))
    return [(int(name.split("_")[0]), name, (folder / name).read_text()) for name in names]


def migrate(database_url: str) -> list[str]:
    """Apply what is missing; returns the names of the migrations applied."""
    # Importing LangGraph's saver costs half a second, and only this function needs it.
    from langgraph.checkpoint.postgres import PostgresSaver  # noqa: PLC0415

    applied = []
    with connect(database_url, name="belay migrate") as conn:
        conn.execute("SELECT pg_advisory_lock(%s)", (_LOCK,))
        try:
            conn.execute(_TABLE)
            done = {row[0] for row in conn.execute("SELECT number FROM belay_migration")}
            for number, name, sql in migrations():
                if number not in done:
                    _apply(conn, number, name, sql)
                    applied.append(name)
            # LangGraph creates indexes CONCURRENTLY, which no transaction may hold.
            PostgresSaver(conn).setup()
            conn.execute(
                "CREATE INDEX CONCURRENTLY IF NOT EXISTS belay_checkpoints_run"
                " ON checkpoints (thread_id, (metadata ->> 'run_id'))"
            )
        finally:
            conn.execute("SELECT pg_advisory_unlock(%s)", (_LOCK,))
    return applied


def _apply(conn: Connection, number: int, name: str, sql: str) -> None:
    with conn.transaction():
        conn.execute("SET LOCAL lock_timeout = '4s'")
        conn.execute("SET LOCAL statement_timeout = '60s'")
        conn.execute(sql)
        conn.execute("INSERT INTO belay_migration (number, name) VALUES (%s, %s)", (number, name))


def schema_is_ready(conn: Connection) -> bool:
    """True when every migration of this code is applied and the checkpoint tables exist."""
    newest = migrations()[-1][0]
    try:
        number = fetch_value(conn, "SELECT max(number) FROM belay_migration", {})
        ready = fetch_value(conn, "SELECT to_regclass('belay_checkpoints_run')", {})
    except psycopg.errors.UndefinedTable:
        return False
    return number is not None and number >= newest and ready is not None


def wait_for_schema(database_url: str, *, seconds: float) -> None:
    """Wait until the schema is ready; raises SchemaNotReady with what to do."""
    deadline = time.monotonic() + seconds
    reason = "the migrations have not been applied"
    while time.monotonic() < deadline:
        try:
            with connect(database_url, name="belay start") as conn:
                if schema_is_ready(conn):
                    return
        except OUTAGE as error:
            reason = str(error).strip()
        time.sleep(0.05)
    raise SchemaNotReady(f"The database is not ready ({reason}). Run: belay migrate")
