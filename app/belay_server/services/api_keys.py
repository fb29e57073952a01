"""Find the caller that an API key belongs to."""

from __future__ import annotations

import time
from dataclasses import dataclass

from belay_server.db import api_keys as key_rows
from belay_server.db.postgres.pool import Database
from belay_server.domain.access import Caller
from belay_server.domain.api_keys import ApiKey, is_same, prefix_of

#: A valid key is cached for this long. After that, every web process refuses a revoked key.
_REMEMBERED_SECONDS = 2.0
_MOST_REMEMBERED = 10_000


@dataclass(slots=True)
class _Known:
    key: ApiKey
    until: float


class ApiKeys:
    """Looks API keys up in Postgres, with a short-lived cache in the web process."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._known: dict[str, _Known] = {}

    def caller_of(self, text: str) -> Caller | None:
        """Return the caller with this key; None for an unknown, revoked or expired key.

        Raises Unavailable.
        """
        prefix = prefix_of(text)
        if prefix is None:
            return None
        key = self._good_key(prefix)
        if key is None or not is_same(text, key.key_hash):
            return None
        return Caller(f"key:{key.prefix}", key.team, everything=key.scope == "all")

    def is_good(self, prefix: str) -> bool:
        """Return whether the key with this prefix is neither revoked nor expired. Raises
        Unavailable."""
        return self._good_key(prefix) is not None

    def _good_key(self, prefix: str) -> ApiKey | None:
        known = self._known.get(prefix)
        if known is not None and known.until > time.monotonic():
            return known.key
        with self._database.connection() as conn:
            key = key_rows.good_api_key(conn, prefix)
            if key is not None:
                key_rows.note_use(conn, key.key_id)
        if key is None:
            self._known.pop(prefix, None)
            return None
        if len(self._known) >= _MOST_REMEMBERED:
            self._known.clear()
        self._known[prefix] = _Known(key, time.monotonic() + _REMEMBERED_SECONDS)
        return key
