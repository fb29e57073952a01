"""Limit what one request may store. The limits are checked before anything is stored.

Postgres limits a JSONB value to 268 MB. A run whose row is near that limit could be inserted and
never be ended: its kwargs contain its context twice, and its webhook's payload repeats both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from belay_server.domain.errors import TooLarge
from belay_server.graphs.serde import to_json

#: The most keys of a document that is merged key by key for each run.
MOST_KEYS = 10_000


def refuse_many_keys(**documents: Mapping[str, Any] | None) -> None:
    """Raise TooLarge for a document, or the `configurable` in it, with more than MOST_KEYS keys."""
    for name, document in documents.items():
        inner = (document or {}).get("configurable")
        for path, keys in ((name, document), (f"{name}.configurable", inner)):
            if isinstance(keys, Mapping) and len(keys) > MOST_KEYS:
                raise TooLarge(
                    f"{path}: has {len(keys):,} keys; at most {MOST_KEYS:,} are allowed. Put them "
                    "below one key."
                )


def refuse_large(limit: int, setting: str, **documents: Any) -> None:
    """Raise TooLarge for a document whose JSON has more than `limit` bytes."""
    for name, document in documents.items():
        if document and (size := len(to_json(document))) > limit:
            raise TooLarge(
                f"{name}: has {size:,} bytes of JSON; at most {limit:,} are allowed ({setting})"
            )
