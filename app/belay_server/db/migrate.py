"""Apply forward-only migrations: numbered SQL files, then LangGraph's own tables.

`belay migrate` (the release process) runs them. All run under one advisory lock, one release after
the other. Each file is one transaction with timeouts, so a migration that cannot get its locks
fails instead of blocking the traffic.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.resources import files
from typing import Any

import psycopg
import tenacity

from belay_server.db.postgres.connection import Connection, connect
from belay_server.db.postgres.outages import is_outage
from belay_server.db.postgres.statements import fetch_value

log = logging.getLogger(__name__)

_LOCK = 7_235_116
#: How long to wait before logging it. A database that starts together with Belay needs a moment.
_SILENT_SECONDS = 2.0
_TABLE = """
CREATE TABLE IF NOT EXISTS belay_migration (
    number     integer PRIMARY KEY,
    name       text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now()
)
"""


#: The distribution with LangGraph's saver and store.
_LANGGRAPH = "langgraph-checkpoint-postgres"
#: What LangGraph and Belay make in addition to Belay's own tables, and what only a store with an
#: index has.
_MADE = (
    *("checkpoint_migrations", "checkpoints", "checkpoint_blobs", "checkpoint_writes"),
    *("belay_checkpoints_run", "store_migrations", "store"),
)
_MADE_FOR_VECTORS = ("vector_migrations", "store_vectors")
_IS_SET_UP = """
SELECT NOT EXISTS (SELECT FROM unnest(%(made)s::text[]) name WHERE to_regclass(name) IS NULL)
FROM belay_library_schema WHERE library = %(library)s AND version = %(version)s
"""
_INVALID_INDEXES = """
SELECT indexrelid::regclass::text FROM pg_index
WHERE NOT indisvalid
  AND indrelid = ANY (SELECT to_regclass(name) FROM unnest(%(made)s::text[]) name)
ORDER BY indexrelid
"""
#: How REINDEX names what an interrupted rebuild of an index has left behind.
_INTERRUPTED_REBUILD = re.compile(r"_cc(new|old)\d*$")
_RECORD_SETUP = """
INSERT INTO belay_library_schema (library, version) VALUES (%(library)s, %(version)s)
ON CONFLICT (library) DO UPDATE SET version = excluded.version
"""
#: Notes deleted checkpoints whose values are in the project's own checkpointer. Its condition is
#: checked for each row; only rows that meet it are queued.
_HAS_TRIGGER = """
SELECT EXISTS (SELECT FROM pg_trigger
WHERE tgname = 'belay_own_checkpoints' AND tgrelid = to_regclass('checkpoints'))
"""
_TRIGGER = """
CREATE TRIGGER belay_own_checkpoints AFTER DELETE ON checkpoints
FOR EACH ROW WHEN (OLD.checkpoint ? 'own_values') EXECUTE FUNCTION belay_note_own_checkpoint()
"""
#: LangGraph's store keeps minutes as whole numbers; a shorter time to live would expire at once.
_FRACTIONS_OF_MINUTES = "ALTER TABLE store ALTER COLUMN ttl_minutes TYPE double precision"
_TTL_TYPE = """
SELECT data_type FROM information_schema.columns
WHERE table_name = 'store' AND column_name = 'ttl_minutes' AND table_schema = current_schema()
"""


class VectorsUnavailable(Exception):
    """The project's store has an index, and this Postgres has no pgvector."""


class SchemaNotReady(Exception):
    """The database's schema is older than this code; run `belay migrate`."""


def migrations() -> list[tuple[int, str, str]]:
    """Return the number, file name and SQL of every migration, in order."""
    folder = files("belay_server.db") / "migrations"
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".sql"))
    return [(int(name.split("_")[0]), name, (folder / name).read_text()) for name in names]


def migrate(database_url: str, *, store_index: dict[str, Any] | None = None) -> list[str]:
    """Apply the missing migrations. Return their names.

    `store_index` is the project's `store.index`; with one, the store has vectors. Raises
    VectorsUnavailable if Postgres has no pgvector.
    """
    applied = []
    with connect(database_url, name="belay migrate") as conn, _lock(conn):
        conn.execute(_TABLE)
        done = {row[0] for row in conn.execute("SELECT number FROM belay_migration")}
        for number, name, sql in migrations():
            if number not in done:
                _apply(conn, number, name, sql)
                applied.append(name)
        _set_up_langgraph(conn, store_index)
        if not fetch_value(conn, _HAS_TRIGGER, {}):
            conn.execute(_TRIGGER)
    return applied


@contextmanager
def _lock(conn: Connection) -> Iterator[None]:
    """Hold the advisory lock of all migrations, which is requested until it is free.

    A statement that waits for it would be a transaction for which CREATE INDEX CONCURRENTLY of the
    release that holds the lock would wait: a deadlock.
    """
    until_taken = tenacity.Retrying(
        retry=tenacity.retry_if_result(lambda is_taken: not is_taken), wait=tenacity.wait_fixed(0.2)
    )
    until_taken(fetch_value, conn, "SELECT pg_try_advisory_lock(%(key)s)", {"key": _LOCK})
    try:
        yield
    finally:
        conn.execute("SELECT pg_advisory_unlock(%s)", (_LOCK,))


def _set_up_langgraph(conn: Connection, store_index: dict[str, Any] | None) -> None:
    """Create or change LangGraph's tables, unless its installed version has done so before."""
    library = _LANGGRAPH if store_index is None else f"{_LANGGRAPH} with vectors"
    installed = {"library": library, "version": version(_LANGGRAPH)}
    made = [*_MADE, *(() if store_index is None else _MADE_FOR_VECTORS)]
    if not fetch_value(conn, _IS_SET_UP, {**installed, "made": made}):
        # LangGraph creates indexes CONCURRENTLY, which Postgres does not allow in transactions.
        _set_up_saver(conn)
        _set_up_store(conn, store_index)
        conn.execute(_RECORD_SETUP, installed)
    _rebuild_invalid_indexes(conn, made)


def _rebuild_invalid_indexes(conn: Connection, tables: list[str]) -> None:
    """Rebuild the indexes whose creation was interrupted. IF NOT EXISTS takes them for existing,
    but no query uses them."""
    for (name,) in conn.execute(_INVALID_INDEXES, {"made": tables}).fetchall():
        is_rest = _INTERRUPTED_REBUILD.search(name) is not None
        log.warning("the index %s is incomplete: %s", name, "dropped" if is_rest else "rebuilt")
        conn.execute(f"{'DROP' if is_rest else 'REINDEX'} INDEX CONCURRENTLY {name}")


def _set_up_saver(conn: Connection) -> None:
    # Importing LangGraph takes half a second, and most calls of `migrate` do not need it.
    from langgraph.checkpoint.postgres import PostgresSaver  # noqa: PLC0415

    PostgresSaver(conn).setup()
    conn.execute(
        "CREATE INDEX CONCURRENTLY IF NOT EXISTS belay_checkpoints_run"
        " ON checkpoints (thread_id, (metadata ->> 'run_id'))"
    )


def _set_up_store(conn: Connection, index: dict[str, Any] | None) -> None:
    from langgraph.store.postgres import PostgresStore  # noqa: PLC0415

    # The embedding function is not called here.
    prepared: Any = None if index is None else {**index, "embed": lambda texts: texts}
    try:
        PostgresStore(conn, index=prepared).setup()
    except (psycopg.errors.FeatureNotSupported, psycopg.errors.UndefinedFile) as error:
        raise VectorsUnavailable(str(error).strip()) from error
    if fetch_value(conn, _TTL_TYPE, {}) == "integer":
        conn.execute(_FRACTIONS_OF_MINUTES)


def _apply(conn: Connection, number: int, name: str, sql: str) -> None:
    with conn.transaction():
        conn.execute("SET LOCAL lock_timeout = '4s'")
        conn.execute("SET LOCAL statement_timeout = '60s'")
        conn.execute(sql)
        conn.execute("INSERT INTO belay_migration (number, name) VALUES (%s, %s)", (number, name))


def schema_is_ready(conn: Connection, *, vectors: bool = False) -> bool:
    """Return whether all of this code's migrations are applied and LangGraph's tables exist.

    With `vectors`, this includes the store's table of vectors.
    """
    last_of_all = "store_vectors" if vectors else "store"
    newest = migrations()[-1][0]
    try:
        number = fetch_value(conn, "SELECT max(number) FROM belay_migration", {})
        ready = fetch_value(conn, "SELECT to_regclass(%(name)s)", {"name": last_of_all})
    except psycopg.errors.UndefinedTable:
        return False
    return number is not None and number >= newest and ready is not None


def wait_for_schema(database_url: str, *, seconds: float, vectors: bool = False) -> None:
    """Wait until the schema is ready, and log the wait. Raises SchemaNotReady after `seconds`."""
    began = time.monotonic()
    reason = "the migrations have not been applied"
    has_said_so = False
    while (waited := time.monotonic() - began) < seconds:
        try:
            with connect(database_url, name="belay start") as conn:
                if schema_is_ready(conn, vectors=vectors):
                    return
        except psycopg.Error as error:
            if not is_outage(error):
                raise
            reason = str(error).strip()
        if waited > _SILENT_SECONDS and not has_said_so:
            log.warning("waiting for the database: %s", reason)
            has_said_so = True
        time.sleep(0.05)
    raise SchemaNotReady(f"The database is not ready ({reason}). Run: belay migrate")
