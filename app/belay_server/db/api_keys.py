"""API keys in Postgres. Each function runs the query of its own name in `sql/api_keys.sql`."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from belay_server.db.connection import Connection, execute, fetch_all, fetch_dicts, fetch_one
from belay_server.db.queries import load_queries
from belay_server.domain.api_keys import ApiKey, NewKey

SQL = load_queries("api_keys")


def insert_api_key(
    conn: Connection, new: NewKey, *, name: str, team: str, scope: str, seconds: float | None
) -> ApiKey:
    """`seconds`: how long it is good for; None: until it is revoked."""
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
    return fetch_all(conn, SQL.list_api_keys, {}, ApiKey)


def revoke_api_key(conn: Connection, named: str) -> list[ApiKey]:
    """Those that it names, by prefix or name."""
    return fetch_all(conn, SQL.revoke_api_key, {"named": named}, ApiKey)


def good_api_key(conn: Connection, prefix: str) -> ApiKey | None:
    """One that is neither revoked nor expired."""
    return fetch_one(conn, SQL.good_api_key, {"prefix": prefix}, ApiKey)


def good_prefixes(conn: Connection, prefixes: Sequence[str]) -> set[str]:
    """Those of these keys that are neither revoked nor expired."""
    rows = fetch_dicts(conn, SQL.good_prefixes, {"prefixes": list(prefixes)})
    return {row["prefix"] for row in rows}


def note_use(conn: Connection, key_id: UUID) -> None:
    execute(conn, SQL.note_use, {"key_id": key_id})
