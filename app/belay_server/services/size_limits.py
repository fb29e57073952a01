"""Bounds on what one request may have stored, checked before anything is.

Postgres itself ends at 268 MB for a JSONB value, and a row near that can be written and never be
ended: a run's context stands in its kwargs twice, and its webhook's payload has both again.
"""

from __future__ import annotations

from typing import Any

from belay_server.domain.errors import TooLarge
from belay_server.graphs.serde import to_json


def refuse_large(limit: int, setting: str, **documents: Any) -> None:
    """Raises TooLarge for a document whose JSON has more than `limit` bytes."""
    for name, document in documents.items():
        if document and (size := len(to_json(document))) > limit:
            raise TooLarge(
                f"{name}: {size:,} bytes of JSON, and at most {limit:,} are kept ({setting})"
            )
