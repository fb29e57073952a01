"""The `store` section of `langgraph.json`: the index for semantic search, and when items expire."""

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


def read_store_config(path: Path, store: Any) -> StoreConfig:
    """Read `{"index": {"dims", "embed", "fields"}, "ttl": {"default_ttl", "refresh_on_read"}}`.

    Raise ProjectError with the name of the entry that is wrong.
    """
    if not isinstance(store, dict):
        raise ProjectError(f"{path}: 'store' must be an object")
    index, ttl = store.get("index"), store.get("ttl") or {}
    if index is not None:
        named = isinstance(index, dict) and isinstance(index.get("embed"), str)
        if not named or not isinstance(index.get("dims"), int) or index["dims"] < 1:
            raise ProjectError(f"{path}: 'store.index' must have 'embed' and 'dims'")
    if not isinstance(ttl, dict):
        raise ProjectError(f"{path}: 'store.ttl' must be an object")
    return StoreConfig(index, ttl)
