"""The routes of the store, whose items are shared by threads and graphs."""

from __future__ import annotations

from typing import Any

from flask import Response, request

from belay_server.api.context import parts
from belay_server.api.http.bodies.json_body import Blueprint, json_response
from belay_server.api.http.error_schemas import Error
from belay_server.api.http.fields import query_flag
from belay_server.api.security.authorization import authorize, authorizes_itself, is_confined
from belay_server.api.store.schemas import (
    ITEM_OR_NULL,
    DeleteItem,
    FoundItems,
    GetItemQuery,
    ListNamespaces,
    Namespaces,
    PutItem,
    SearchItems,
)
from belay_server.domain.errors import BadRequest, Forbidden
from belay_server.services import store

blueprint = Blueprint("store", __name__, description="Items that threads and graphs share")


@blueprint.put("/store/items")
@blueprint.arguments(PutItem)
@blueprint.alt_response(204, description="Stored")
@blueprint.alt_response(400, schema=Error)
@authorizes_itself
def put_item(body: dict[str, Any]) -> Response:
    """Store an item. It replaces the item with the same namespace and key."""
    store.put_item(parts(), {**body, "namespace": _allowed("put", body["namespace"], body)})
    return Response(status=204)


@blueprint.get("/store/items")
@blueprint.arguments(GetItemQuery, location="query")
@blueprint.response(200, ITEM_OR_NULL, description="The item, or null when there is none")
@blueprint.alt_response(400, schema=Error)
@authorizes_itself
def get_item(query: dict[str, Any]) -> Response:
    """Get an item by its namespace and key."""
    if "key" not in query:
        raise BadRequest("Key is required")
    asked = query.get("namespace") or []
    labels = (
        asked[0].split(".") if len(asked) == 1 and asked[0] else [label for label in asked if label]
    )
    refresh = query_flag("refresh_ttl") if "refresh_ttl" in request.args else None
    namespace = store.checked_namespace(_allowed("get", labels, query))
    return json_response(
        store.get_item(parts().store, namespace, query["key"], refresh_ttl=refresh)
    )


@blueprint.delete("/store/items")
@blueprint.arguments(DeleteItem)
@blueprint.alt_response(204, description="Deleted, or it did not exist")
@blueprint.alt_response(400, schema=Error)
@authorizes_itself
def delete_item(body: dict[str, Any]) -> Response:
    """Delete an item by its namespace and key."""
    namespace = store.checked_namespace(_allowed("delete", body["namespace"], body))
    store.delete_item(parts().store, namespace, body["key"])
    return Response(status=204)


@blueprint.post("/store/items/search")
@blueprint.arguments(SearchItems)
@blueprint.response(200, FoundItems)
@blueprint.alt_response(400, schema=Error)
@authorizes_itself
def search_items(body: dict[str, Any]) -> Response:
    """Search items by namespace prefix and filter; by similarity, if the store has an index."""
    prefix = _allowed("search", body.get("namespace_prefix") or [], body)
    found = store.search_items(parts(), {**body, "namespace_prefix": prefix})
    return json_response({"items": found})


@blueprint.post("/store/namespaces")
@blueprint.arguments(ListNamespaces)
@blueprint.response(200, Namespaces)
@blueprint.alt_response(400, schema=Error)
@authorizes_itself
def list_namespaces(body: dict[str, Any]) -> Response:
    """List the namespaces of items. `*` in a prefix or a suffix matches any one label."""
    prefix = _allowed("list_namespaces", body.get("prefix") or [], body)
    return json_response(
        {"namespaces": store.list_namespaces(parts().store, {**body, "prefix": prefix})}
    )


def _allowed(action: str, namespace: list[str], body: dict[str, Any]) -> list[str]:
    """Authorize an action, and return the namespace as the project's handler has changed it.

    Raises BadRequest, InvalidRequest, Forbidden, Refused.
    """
    lists = action == "list_namespaces"
    store.checked_namespace(namespace, wildcards=lists)
    value = {**body, "namespace": tuple(namespace)}
    if lists and not namespace:
        value["namespace"] = None
    authorize("store", action, value)
    allowed = [str(label) for label in value["namespace"] or ()]
    if lists and is_confined() and allowed[:1] == ["*"]:
        # The wildcard would list the namespaces of all users.
        raise Forbidden("The first label of a prefix must not be a wildcard")
    return allowed
