"""Read and write items of the store, which clients and graphs share."""

from __future__ import annotations

from typing import Any

from langgraph.store.base import NOT_PROVIDED, BaseStore
from langgraph.store.base.embed import get_text_at_path, tokenize_path

from belay_server.domain.errors import BadRequest, InvalidRequest, TooMuch
from belay_server.graphs.registry import GraphRegistry
from belay_server.graphs.serde import to_json
from belay_server.graphs.store import as_filter
from belay_server.services.parts import Parts

Namespace = tuple[str, ...]
#: An index row contains the namespace and the key, and for semantic search a path too. Postgres
#: limits an index row to 2,704 bytes.
LONGEST_LABEL = 256
LONGEST_NAMESPACE = 1_000
LONGEST_KEY = 1_000
LONGEST_PATH = 400
MOST_PATHS = 100
#: The most texts of one item that are indexed for semantic search.
MOST_TEXTS = 200
#: The most bytes of the texts of one item that are indexed, and of a query. The project's function
#: embeds them in the web process.
MOST_TEXT_BYTES = 1024 * 1024
MOST_QUERY_BYTES = 64 * 1024
#: The most values, and bytes of JSON, that all paths of one item may visit together.
MOST_LOOKED_AT = 20_000
MOST_BYTES_LOOKED_AT = 32 * 1024 * 1024
#: The batch size of reading a search's items.
_MOST_AT_ONCE = 50
#: In minutes: a millisecond. Postgres does not accept much shorter intervals.
_SHORTEST_TTL = 1 / 60_000


def checked_namespace(
    labels: list[str], *, may_be_empty: bool = True, wildcards: bool = False
) -> Namespace:
    """Return a namespace. Raises BadRequest or InvalidRequest for one that the library would not
    store, or not find again."""
    if not labels and not may_be_empty:
        raise BadRequest("Namespace cannot be empty.")
    for label in labels:
        if not label or "." in label:
            raise InvalidRequest(
                f"Namespace label '{label}' must be a non-empty string without periods"
            )
        if label == "*" and not wildcards:
            raise InvalidRequest("Namespace label '*' is a wildcard; give a label without '*'")
        if len(label) > LONGEST_LABEL:
            raise InvalidRequest(
                f"Namespace label '{label[:20]}…' has more than {LONGEST_LABEL} characters"
            )
    if len(".".join(labels).encode()) > LONGEST_NAMESPACE:
        raise InvalidRequest(f"A namespace has at most {LONGEST_NAMESPACE} bytes, dots included")
    if labels and labels[0] == "langgraph":
        raise BadRequest("The root label of a namespace cannot be 'langgraph'.")
    return tuple(labels)


def checked_key(key: str) -> str:
    """Return a key. Raises InvalidRequest for one that is too long."""
    if len(key.encode()) > LONGEST_KEY:
        raise InvalidRequest(f"key: has more than {LONGEST_KEY} bytes")
    return key


def checked_index(index: Any) -> Any:
    """Return the paths into the value without duplicates. Raises InvalidRequest."""
    if not index:
        return index
    paths = list(dict.fromkeys(index))
    if len(paths) > MOST_PATHS or any(len(path.encode()) > LONGEST_PATH for path in paths):
        raise InvalidRequest(
            f"index: at most {MOST_PATHS} paths, each of at most {LONGEST_PATH} bytes"
        )
    return paths


def put_item(parts: Parts, body: dict[str, Any]) -> None:
    """Store an item. Raises BadRequest, InvalidRequest."""
    namespace = checked_namespace(body["namespace"], may_be_empty=False)
    checked_key(body["key"])
    ttl = body.get("ttl", NOT_PROVIDED)
    if isinstance(ttl, (int, float)):
        ttl = max(ttl, _SHORTEST_TTL)
    index = checked_index(body.get("index"))
    _refuse_many_texts(parts.graphs, body["value"], index)
    parts.store.put(namespace, body["key"], body["value"], index=index, ttl=ttl)


def _refuse_many_texts(graphs: GraphRegistry, value: dict[str, Any], paths: Any) -> None:
    """Raise InvalidRequest for more texts than MOST_TEXTS or MOST_TEXT_BYTES, as each becomes a
    vector; and for paths that would take too long. The library visits the item's values once for
    each path, and for each of the fields that a path lists in braces."""
    config = graphs.store.index
    if config is None or paths is False:
        return
    fields = paths or config.get("fields") or ["$"]
    looks = sum(1 + path.count(",") for path in fields)
    most_values = MOST_LOOKED_AT // looks
    if looks > 1 and _has_more_values(value, most_values):
        raise InvalidRequest(
            f"index: {looks} paths into an item of more than {most_values:,} values take too long; "
            "give fewer paths"
        )
    if looks > 1 and looks * (size := len(to_json(value))) > MOST_BYTES_LOOKED_AT:
        raise InvalidRequest(
            f"index: {looks} paths into an item of {size:,} bytes take too long; give fewer paths"
        )
    texts = [text for path in fields for text in get_text_at_path(value, tokenize_path(path))]
    if len(texts) > MOST_TEXTS:
        raise InvalidRequest(
            f"index: the paths find {len(texts)} texts; at most {MOST_TEXTS} are allowed"
        )
    if (size := sum(len(text.encode("utf-8", "replace")) for text in texts)) > MOST_TEXT_BYTES:
        raise InvalidRequest(
            f"index: the paths find {size:,} bytes of text; at most {MOST_TEXT_BYTES:,} are "
            "indexed. Name the fields to search by, or send `false`."
        )


def _has_more_values(value: dict[str, Any], most: int) -> bool:
    """Return whether a document has more values than `most`, including nested values."""
    seen = 0
    left: list[Any] = [value]
    while left:
        found = left.pop()
        seen += len(found)
        if seen > most:
            return True
        inner = found.values() if isinstance(found, dict) else found
        left.extend(one for one in inner if isinstance(one, (dict, list)))
    return False


def get_item(
    store: BaseStore, namespace: Namespace, key: str, *, refresh_ttl: bool | None
) -> dict[str, Any] | None:
    """Return an item as JSON; None if there is none. `refresh_ttl` None: as the project sets it."""
    item = store.get(namespace, key, refresh_ttl=refresh_ttl)
    return None if item is None else item.dict()


def delete_item(store: BaseStore, namespace: Namespace, key: str) -> None:
    """Delete an item. Do nothing if it does not exist."""
    store.delete(namespace, key)


def search_items(parts: Parts, body: dict[str, Any]) -> list[dict[str, Any]]:
    """Search by namespace prefix and filter, and by similarity if the project has an index.

    Raises BadRequest, InvalidRequest, TooMuch.
    """
    namespace = checked_namespace(body.get("namespace_prefix") or [])
    if len((body.get("query") or "").encode()) > MOST_QUERY_BYTES:
        raise InvalidRequest(f"query: has more than {MOST_QUERY_BYTES:,} bytes")
    most_bytes = parts.settings.max_answer_bytes
    found: list[dict[str, Any]] = []
    size = 0
    while len(found) < body["limit"]:
        at_once = min(_MOST_AT_ONCE, body["limit"] - len(found))
        items = parts.store.search(
            namespace,
            query=body.get("query"),
            filter=as_filter(body.get("filter")),
            limit=at_once,
            offset=body["offset"] + len(found),
            refresh_ttl=body.get("refresh_ttl"),
        )
        for item in items:
            found.append({**item.dict(), "score": item.score})
            size += len(to_json(item.value))
            if size > most_bytes and len(found) > 1:
                raise TooMuch(most_bytes)
        if len(items) < at_once:
            break
    return found


def list_namespaces(store: BaseStore, body: dict[str, Any]) -> list[Namespace]:
    """Return a page of namespaces. `*` in a prefix or a suffix matches any one label."""
    prefix = checked_namespace(body.get("prefix") or [], wildcards=True)
    suffix = checked_namespace(body.get("suffix") or [], wildcards=True)
    return store.list_namespaces(
        prefix=prefix or None,
        suffix=suffix or None,
        max_depth=body.get("max_depth"),
        limit=body["limit"],
        offset=body["offset"],
    )
