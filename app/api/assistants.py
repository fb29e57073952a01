"""Assistants."""

from __future__ import annotations

from typing import Any

from flask import Response

from app.api.assistant_schemas import Assistant, CreateAssistant, SearchAssistants
from app.api.error_schemas import Error
from app.api.fields import path_uuid
from app.api.json_body import Blueprint, json_response
from app.api.pages import page_response, shown
from app.api.parts import parts
from app.db import assistants as assistant_rows
from app.domain.assistants import ASSISTANT_FIELDS
from app.domain.errors import NotFound
from app.services import assistants

blueprint = Blueprint("assistants", __name__, description="Graphs with configuration")


@blueprint.post("/assistants")
@blueprint.arguments(CreateAssistant)
@blueprint.response(200, Assistant)
@blueprint.alt_response(400, schema=Error)
@blueprint.alt_response(404, schema=Error, description="Unknown graph")
@blueprint.alt_response(409, schema=Error, description="The id is taken")
@blueprint.alt_response(422, schema=Error)
def create_assistant(body: dict[str, Any]) -> Response:
    return json_response(shown(assistants.create_assistant(parts(), body), ASSISTANT_FIELDS))


@blueprint.get("/assistants/<assistant_id>")
@blueprint.response(200, Assistant)
@blueprint.alt_response(404, schema=Error)
@blueprint.alt_response(422, schema=Error)
def get_assistant(assistant_id: str) -> Response:
    with parts().database.connection() as conn:
        assistant = assistants.get_assistant(conn, path_uuid(assistant_id, "assistant"))
    return json_response(shown(assistant, ASSISTANT_FIELDS))


@blueprint.delete("/assistants/<assistant_id>")
@blueprint.alt_response(204, description="Deleted; its runs in flight were stopped first")
@blueprint.alt_response(404, schema=Error)
@blueprint.alt_response(409, schema=Error, description="It is a graph's own assistant")
@blueprint.alt_response(422, schema=Error)
def delete_assistant(assistant_id: str) -> Response:
    assistants.delete_assistant(parts(), path_uuid(assistant_id, "assistant"))
    return Response(status=204)


@blueprint.post("/assistants/search")
@blueprint.arguments(SearchAssistants)
@blueprint.response(200, Assistant(many=True))
@blueprint.alt_response(404, schema=Error, description="Unknown graph")
@blueprint.alt_response(422, schema=Error)
def search_assistants(body: dict[str, Any]) -> Response:
    graph_id, name = body.get("graph_id"), body.get("name")
    if graph_id is not None and graph_id not in parts().graphs:
        raise NotFound(f"Graph '{graph_id}' not found.")
    metadata = body.get("metadata") or {}
    with parts().database.connection() as conn:
        found = assistant_rows.search_assistants(
            conn,
            graph_id=graph_id,
            name=name,
            metadata=metadata,
            sort_by=body["sort_by"] or "created_at",
            sort_order=body["sort_order"] or "desc",
            limit=body["limit"],
            offset=body["offset"],
        )
        total = assistant_rows.count_assistants(
            conn, graph_id=graph_id, name=name, metadata=metadata
        )
    fields = body.get("select") or ASSISTANT_FIELDS
    items = [shown(assistant, fields) for assistant in found]
    return page_response(items, total=total, limit=body["limit"], offset=body["offset"])
