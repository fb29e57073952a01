"""API keys: what they look like, and how one is told from another. No I/O.

A key is 192 random bits, so its hash needs no salt and no slowness: nobody can try them all. It
begins with a prefix that is no secret, by which its row is found.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

#: Of a key: the word by which scanners find keys that were published, a prefix, the secret.
_KEY = re.compile(r"belay_([a-z0-9]{12})_([A-Za-z0-9_-]{32})", re.ASCII)
_PREFIX_ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789"
_PREFIX_LENGTH = 12
_SECRET_BYTES = 24
SCOPES = ("all", "agent_runs")


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key as it is kept: without its secret."""

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
    """A key as it is shown, once."""

    text: str
    prefix: str
    key_hash: bytes


def make_key() -> NewKey:
    prefix = "".join(secrets.choice(_PREFIX_ALPHABET) for _ in range(_PREFIX_LENGTH))
    text = f"belay_{prefix}_{secrets.token_urlsafe(_SECRET_BYTES)}"
    return NewKey(text, prefix, hash_of(text))


def prefix_of(text: str) -> str | None:
    """By which to find its row; None for what is no key of ours."""
    found = _KEY.fullmatch(text)
    return None if found is None else found[1]


def hash_of(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def is_same(text: str, key_hash: bytes) -> bool:
    """In a time that does not tell how much of it is right."""
    return hmac.compare_digest(hash_of(text), key_hash)
