"""Make, hash and compare API keys. No I/O.

A key's secret has 192 random bits. It cannot be guessed by trying, so its hash needs neither a salt
nor a slow algorithm. The key has a public prefix by which its row is found.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

#: A key: a word by which scanners find published keys, the public prefix and the secret.
_KEY = re.compile(r"belay_([a-z0-9]{12})_([A-Za-z0-9_-]{32})", re.ASCII)
_PREFIX_ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789"
_PREFIX_LENGTH = 12
_SECRET_BYTES = 24
SCOPES = ("all", "agent_runs")


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A stored key, without its secret."""

    key_id: UUID
    prefix: str
    key_hash: bytes
    name: str
    team: str
    scope: str
    created_at: datetime
    expires_at: datetime | None
    last_used_at: datetime | None
    revoked_at: datetime | None


@dataclass(frozen=True, slots=True)
class NewKey:
    """A new key. Its text is shown once and not stored."""

    text: str
    prefix: str
    key_hash: bytes


def make_key() -> NewKey:
    """Return a new random key."""
    prefix = "".join(secrets.choice(_PREFIX_ALPHABET) for _ in range(_PREFIX_LENGTH))
    text = f"belay_{prefix}_{secrets.token_urlsafe(_SECRET_BYTES)}"
    return NewKey(text, prefix, hash_of(text))


def prefix_of(text: str) -> str | None:
    """Return a key's prefix, by which its row is found. Return None if the text is no key."""
    found = _KEY.fullmatch(text)
    return None if found is None else found[1]


def hash_of(text: str) -> bytes:
    """Return the SHA-256 hash of a key."""
    return hashlib.sha256(text.encode()).digest()


def is_same(text: str, key_hash: bytes) -> bool:
    """Return whether a key has this hash. Compare in constant time."""
    return hmac.compare_digest(hash_of(text), key_hash)
