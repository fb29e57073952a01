"""Read and write API keys. Each function runs the query of its name in `sql/api_keys.sql`."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from belay_server.db.postgres.connection import Connection
from belay_server.db.postgres.queries import load_queries
from belay_server.db.postgres.statements import execute, fetch_all, fetch_dicts, fetch_one
from belay_server.domain.api_keys import ApiKey, NewKey

SQL = load_queries("api_keys")


def insert_api_key(
    conn: Connection, new: NewKey, *, name: str, team: str, scope: str, seconds: float | None
) -> ApiKey:
    """Insert a key that expires after `seconds`. With None it is valid until it is revoked."""
    params = {
        "prefix": new.prefix,
        "key_hash": new.key_hash,
        "name": name,
        "team": team,
        "scope": scope,
        "seconds": seconds,
    }
    key = fetch_one(conn, SQL.insert_api_key, params, ApiKey)
    assert key is not None
    return key


def list_api_keys(conn: Connection) -> list[ApiKey]:
    """Return all keys, oldest first, including revoked and expired ones."""
    return fetch_all(conn, SQL.list_api_keys, {}, ApiKey)


def revoke_api_key(conn: Connection, named: str) -> list[ApiKey]:
    """Revoke the keys with this prefix or name, and return them."""
    return fetch_all(conn, SQL.revoke_api_key, {"named": named}, ApiKey)


def good_api_key(conn: Connection, prefix: str) -> ApiKey | None:
    """Return the key with this prefix if it is neither revoked nor expired, else None."""
    return fetch_one(conn, SQL.good_api_key, {"prefix": prefix}, ApiKey)


def good_prefixes(conn: Connection, prefixes: Sequence[str]) -> set[str]:
    """Return the prefixes whose keys are neither revoked nor expired."""
    rows = fetch_dicts(conn, SQL.good_prefixes, {"prefixes": list(prefixes)})
    return {row["prefix"] for row in rows}


def note_use(conn: Connection, key_id: UUID) -> None:
    """Record that a key has been used now, to the minute."""
    execute(conn, SQL.note_use, {"key_id": key_id})
