"""Items of the store that clients and graphs share."""

from __future__ import annotations

from typing import Any

from langgraph.store.base import NOT_PROVIDED

from app.domain.errors import BadRequest, InvalidRequest
from app.graphs.store import as_filter
from app.services.parts import Parts

Namespace = tuple[str, ...]
#: In minutes: a millisecond. Postgres takes no interval that is much shorter.
_SHORTEST_TTL = 1 / 60_000


def checked_namespace(labels: list[str], *, may_be_empty: bool = True) -> Namespace:
    """Raises BadRequest, InvalidRequest for what the library would not keep, or not find again."""
    if not labels and not may_be_empty:
        raise BadRequest("Namespace cannot be empty.")
    for label in labels:
        if not label or "." in label:
            raise InvalidRequest(
                f"Namespace label '{label}' must be a non-empty string without periods"
            )
    if labels and labels[0] == "langgraph":
        raise BadRequest("The root label of a namespace cannot be 'langgraph'.")
    return tuple(labels)


def put_item(parts: Parts, body: dict[str, Any]) -> None:
    namespace = checked_namespace(body["namespace"], may_be_empty=False)
    ttl = body.get("ttl", NOT_PROVIDED)
    if isinstance(ttl, (int, float)):
        ttl = max(ttl, _SHORTEST_TTL)
    index = body.get("index")
    if index:
        index = list(dict.fromkeys(index))  # a path that is named twice is indexed once
    parts.store.put(namespace, body["key"], body["value"], index=index, ttl=ttl)


def get_item(
    parts: Parts, namespace: Namespace, key: str, *, refresh_ttl: bool | None
) -> dict[str, Any] | None:
    item = parts.store.get(namespace, key, refresh_ttl=refresh_ttl)
    return None if item is None else item.dict()


def delete_item(parts: Parts, namespace: Namespace, key: str) -> None:
    parts.store.delete(namespace, key)


def search_items(parts: Parts, body: dict[str, Any]) -> list[dict[str, Any]]:
    """By namespace prefix, filter, and meaning where the project has an index."""
    found = parts.store.search(
        checked_namespace(body.get("namespace_prefix") or []),
        query=body.get("query"),
        filter=as_filter(body.get("filter")),
        limit=body["limit"],
        offset=body["offset"],
        refresh_ttl=body.get("refresh_ttl"),
    )
    return [{**item.dict(), "score": item.score} for item in found]


def list_namespaces(parts: Parts, body: dict[str, Any]) -> list[Namespace]:
    """`*` in a prefix or a suffix stands for any one label."""
    prefix = checked_namespace(body.get("prefix") or [])
    suffix = checked_namespace(body.get("suffix") or [])
    return parts.store.list_namespaces(
        prefix=prefix or None,
        suffix=suffix or None,
        max_depth=body.get("max_depth"),
        limit=body["limit"],
        offset=body["offset"],
    )
