"""The `store` section of `langgraph.json`: the index for semantic search, when items expire, or a
store of the project's own."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from belay_server.graphs.project.loading import ProjectError


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """The project's configuration of its store. After loading, `index` has the embedding
    function; before, its name."""

    index: dict[str, Any] | None = None
    ttl: dict[str, Any] = field(default_factory=dict)
    #: The store of the project's own, in which the others have no effect.
    path: str | None = None


def read_store_config(path: Path, store: Any) -> StoreConfig:
    """Read `{"index": {"dims", "embed", "fields"}, "ttl": {"default_ttl", "refresh_on_read"}}`, or
    `{"path": "./store.py:open_store"}`.

    Raise ProjectError with the name of the entry that is wrong.
    """
    if not isinstance(store, dict):
        raise ProjectError(f"{path}: 'store' must be an object")
    own = store.get("path")
    if own is not None:
        if not isinstance(own, str) or ":" not in own:
            raise ProjectError(f"{path}: 'store.path' must be 'path/to/file.py:variable'")
        return StoreConfig(path=own)
    index, ttl = store.get("index"), store.get("ttl") or {}
    if index is not None:
        named = isinstance(index, dict) and isinstance(index.get("embed"), str)
        if not named or not isinstance(index.get("dims"), int) or index["dims"] < 1:
            raise ProjectError(f"{path}: 'store.index' must have 'embed' and 'dims'")
    if not isinstance(ttl, dict):
        raise ProjectError(f"{path}: 'store.ttl' must be an object")
    return StoreConfig(index, ttl)
