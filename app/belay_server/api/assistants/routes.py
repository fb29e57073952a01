"""The routes of assistants."""

from __future__ import annotations

import re
from typing import Any

from flask import Response

from belay_server.api.assistants.schemas import (
    BY_NAMESPACE,
    Assistant,
    AssistantVersion,
    CountAssistants,
    CreateAssistant,
    DeleteAssistantQuery,
    Drawing,
    GraphQuery,
    GraphSchemas,
    ListVersions,
    PatchAssistant,
    SearchAssistants,
    SelectedAssistant,
    SetLatest,
    SubgraphsQuery,
)
from belay_server.api.context import parts
from belay_server.api.http.bodies.json_body import Blueprint, json_response
from belay_server.api.http.error_schemas import Error
from belay_server.api.http.fields import path_uuid, query_flag
from belay_server.api.http.pages import COUNT, page_response, shown
from belay_server.api.security.authorization import authorize, authorized
from belay_server.db import assistants as assistant_rows
from belay_server.db.assistants import AssistantFilter
from belay_server.domain.assistants import ASSISTANT_FIELDS, VERSION_FIELDS
from belay_server.domain.errors import InvalidRequest, NotFound
from belay_server.graphs import graph_shapes
from belay_server.services import assistants
from belay_server.services.placements import placement_of

PLACEMENT_HEADER = {
    "x-belay-placement": {
        "description": "Where the runs of the graph are executed (`shared` hosts or a `process` "
        "for each), why, and which workers have isolated the graph",
        "schema": {"type": "string"},
    }
}
blueprint = Blueprint("assistants", __name__, description="Graphs with configuration")


@blueprint.post("/assistants")
@blueprint.arguments(CreateAssistant)
@blueprint.response(200, Assistant)
@blueprint.alt_response(400, schema=Error)
@blueprint.alt_response(404, schema=Error, description="Unknown graph")
@blueprint.alt_response(409, schema=Error, description="The id is already in use")
@authorized("assistants", "create")
def create_assistant(body: dict[str, Any]) -> Response:
    """Create an assistant, or with `if_exists: do_nothing` return the one that has the id."""
    return json_response(shown(assistants.create_assistant(parts(), body), ASSISTANT_FIELDS))


@blueprint.get("/assistants/<assistant_id>")
@blueprint.response(200, Assistant, headers=PLACEMENT_HEADER)
@blueprint.alt_response(404, schema=Error)
@authorized("assistants", "read")
def get_assistant(assistant_id: str) -> Response:
    """Get an assistant, with the fields of its current version."""
    with parts().database.connection() as conn:
        assistant = assistants.get_assistant(conn, path_uuid(assistant_id, "assistant"))
    response = json_response(shown(assistant, ASSISTANT_FIELDS))
    if (placement := placement_of(parts(), assistant.graph_id)) is not None:
        response.headers["x-belay-placement"] = placement
    return response


@blueprint.patch("/assistants/<assistant_id>")
@blueprint.arguments(PatchAssistant)
@blueprint.response(200, Assistant)
@blueprint.alt_response(400, schema=Error)
@blueprint.alt_response(404, schema=Error)
@authorized("assistants", "update")
def patch_assistant(body: dict[str, Any], assistant_id: str) -> Response:
    """Update an assistant. This creates a new version, even if nothing changes."""
    patched = assistants.patch_assistant(parts(), path_uuid(assistant_id, "assistant"), body)
    return json_response(shown(patched, ASSISTANT_FIELDS))


@blueprint.delete("/assistants/<assistant_id>")
@blueprint.arguments(DeleteAssistantQuery, location="query")
@blueprint.alt_response(204, description="Deleted; its active runs were stopped")
@blueprint.alt_response(404, schema=Error)
@blueprint.alt_response(409, schema=Error, description="The system assistant of a graph")
@authorized("assistants", "delete")
def delete_assistant(_query: dict[str, Any], assistant_id: str) -> Response:
    """Delete an assistant with its versions and the user's crons of it; stop its active runs."""
    authorize("threads", "delete", {"assistant_id": assistant_id})
    assistants.delete_assistant(
        parts(),
        path_uuid(assistant_id, "assistant"),
        delete_threads=query_flag("delete_threads"),
    )
    return Response(status=204)


@blueprint.post("/assistants/<assistant_id>/versions")
@blueprint.arguments(ListVersions)
@blueprint.response(200, AssistantVersion(many=True))
@blueprint.alt_response(404, schema=Error)
@authorized("assistants", "read")
def list_versions(body: dict[str, Any], assistant_id: str) -> Response:
    """List an assistant's versions, newest first."""
    found = assistants.list_versions(
        parts().database,
        path_uuid(assistant_id, "assistant"),
        metadata=body.get("metadata") or {},
        limit=body["limit"],
        offset=body["offset"],
    )
    return json_response([shown(version, VERSION_FIELDS) for version in found])


@blueprint.post("/assistants/<assistant_id>/latest")
@blueprint.arguments(SetLatest)
@blueprint.response(200, Assistant)
@blueprint.alt_response(404, schema=Error)
@authorized("assistants", "update")
def set_latest(body: dict[str, Any], assistant_id: str) -> Response:
    """Set the version that runs use."""
    latest = assistants.set_latest(
        parts().database, path_uuid(assistant_id, "assistant"), body["version"]
    )
    return json_response(shown(latest, ASSISTANT_FIELDS))


@blueprint.get("/assistants/<assistant_id>/graph")
@blueprint.arguments(GraphQuery, location="query")
@blueprint.response(200, Drawing)
@blueprint.alt_response(400, schema=Error)
@blueprint.alt_response(404, schema=Error)
@authorized("assistants", "read")
def draw_graph(query: dict[str, Any], assistant_id: str) -> Response:
    """Draw a graph, by an assistant's id or a graph's name."""
    xray = _xray(query.get("xray", "false"))
    _, graph = assistants.graph_of(parts(), assistant_id)
    return json_response(graph_shapes.draw(graph, xray=xray))


def _xray(text: str) -> int | bool:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if re.fullmatch("[1-9][0-9]{0,3}", text, re.ASCII) is None:
        raise InvalidRequest("Invalid xray value")
    return int(text)


@blueprint.get("/assistants/<assistant_id>/subgraphs")
@blueprint.get("/assistants/<assistant_id>/subgraphs/<path:namespace>")
@blueprint.arguments(SubgraphsQuery, location="query")
@blueprint.response(200, BY_NAMESPACE, description="The schemas of subgraphs, by namespace")
@blueprint.alt_response(400, schema=Error)
@blueprint.alt_response(404, schema=Error)
@authorized("assistants", "read")
def list_subgraphs(
    query: dict[str, Any], assistant_id: str, namespace: str | None = None
) -> Response:
    """Get the schemas of a graph's subgraphs, by an assistant's id or a graph's name."""
    _, graph = assistants.graph_of(parts(), assistant_id)
    found = graph_shapes.subgraphs_of(
        graph,
        namespace=namespace or query.get("namespace"),
        recurse=query_flag("recurse"),
    )
    return json_response(found)


@blueprint.get("/assistants/<assistant_id>/schemas")
@blueprint.response(200, GraphSchemas)
@blueprint.alt_response(400, schema=Error)
@blueprint.alt_response(404, schema=Error)
@authorized("assistants", "read")
def get_schemas(assistant_id: str) -> Response:
    """Get the JSON schemas of a graph, by an assistant's id or a graph's name."""
    graph_id, graph = assistants.graph_of(parts(), assistant_id)
    schemas = graph_shapes.known_schemas_of(graph, parts().graphs.schemas)
    return json_response({"graph_id": graph_id, **schemas})


def _filter(body: dict[str, Any]) -> AssistantFilter:
    graph_id = body.get("graph_id")
    if graph_id is not None and graph_id not in parts().graphs:
        raise NotFound(f"Graph '{graph_id}' not found.")
    return AssistantFilter(graph_id, body.get("name"), body.get("metadata") or {})


@blueprint.post("/assistants/count")
@blueprint.arguments(CountAssistants)
@blueprint.response(200, COUNT)
@blueprint.alt_response(404, schema=Error, description="Unknown graph")
@authorized("assistants", "search")
def count_assistants(body: dict[str, Any]) -> Response:
    """Count the assistants that match all given conditions."""
    filter_ = _filter(body)
    with parts().database.connection() as conn:
        return json_response(assistant_rows.count_assistants(conn, filter_))


@blueprint.post("/assistants/search")
@blueprint.arguments(SearchAssistants)
@blueprint.response(200, SelectedAssistant(many=True))
@blueprint.alt_response(404, schema=Error, description="Unknown graph")
@authorized("assistants", "search")
def search_assistants(body: dict[str, Any]) -> Response:
    """Search assistants. The total number of matches is in `x-pagination-total`."""
    filter_ = _filter(body)
    with parts().database.connection() as conn:
        found = assistant_rows.search_assistants(
            conn,
            filter_,
            sort_by=body["sort_by"] or "created_at",
            sort_order=body["sort_order"] or "desc",
            limit=body["limit"],
            offset=body["offset"],
        )
        total = assistant_rows.count_assistants(conn, filter_)
    fields = body.get("select") or ASSISTANT_FIELDS
    items = [shown(assistant, fields) for assistant in found]
    return page_response(items, total=total, limit=body["limit"], offset=body["offset"])
