"""Assistants on the wire."""

from __future__ import annotations

import marshmallow as ma

from belay_server.api.http.fields import (
    Body,
    Filter,
    Integer,
    Object,
    Selected,
    StringList,
    Uuid,
    one_of,
)
from belay_server.api.http.page_schemas import Paged, Sorted
from belay_server.api.runs.config_schemas import RunConfig
from belay_server.db.assistants import SORT_COLUMNS
from belay_server.domain.assistants import ASSISTANT_FIELDS


class AssistantVersion(ma.Schema):
    """An assistant as it was."""

    assistant_id = Uuid(required=True)
    graph_id = ma.fields.String(required=True)
    config = Object(required=True)
    context = Object(required=True)
    metadata = Object(required=True)
    name = ma.fields.String(required=True)
    description = ma.fields.String(allow_none=True)
    version = ma.fields.Integer(required=True)
    created_at = ma.fields.DateTime(required=True)


class Assistant(AssistantVersion):
    """As it is now."""

    updated_at = ma.fields.DateTime(required=True)


class SelectedAssistant(Selected, Assistant):
    """The fields that were asked for; all, if none were."""


class CreateAssistant(Body):
    """A graph with configuration of its own."""

    graph_id = ma.fields.String(required=True)
    assistant_id = Uuid()
    name = ma.fields.String(allow_none=True)
    description = ma.fields.String(allow_none=True)
    config = ma.fields.Nested(RunConfig, allow_none=True)
    context = Object(allow_none=True)
    metadata = Object(allow_none=True)
    if_exists = ma.fields.String(validate=one_of("raise", "do_nothing"), load_default="raise")


class PatchAssistant(Body):
    """Metadata is merged; whatever else is given is replaced."""

    graph_id = ma.fields.String(allow_none=True)
    name = ma.fields.String(allow_none=True)
    description = ma.fields.String(allow_none=True)
    config = ma.fields.Nested(RunConfig, allow_none=True)
    context = Object(allow_none=True)
    metadata = Object(allow_none=True)


class ListVersions(Body, Paged):
    metadata = Filter()


class SetLatest(Body):
    version = Integer(required=True, validate=ma.validate.Range(1, 2**31 - 1))


class DeleteAssistantQuery(ma.Schema):
    delete_threads = ma.fields.String(
        metadata={"description": "true: also the threads whose last run was this assistant's."}
    )


class GraphQuery(ma.Schema):
    xray = ma.fields.String(
        metadata={"description": "true, or how many levels deep to draw subgraphs."}
    )


class SubgraphsQuery(ma.Schema):
    namespace = ma.fields.String(metadata={"description": "Only this one."})
    recurse = ma.fields.String(metadata={"description": "true: subgraphs of subgraphs, too."})


class Drawing(ma.Schema):
    nodes = ma.fields.List(Object(), required=True)
    edges = ma.fields.List(Object(), required=True)


class GraphSchemas(ma.Schema):
    """JSON schemas; null where the graph's types cannot be described."""

    graph_id = ma.fields.String(required=True)
    input_schema = Object(required=True, allow_none=True)
    output_schema = Object(required=True, allow_none=True)
    state_schema = Object(required=True, allow_none=True)
    config_schema = Object(required=True, allow_none=True)
    context_schema = Object(required=True, allow_none=True)


_SCHEMAS = [name for name in GraphSchemas._declared_fields if name != "graph_id"]
#: What the subgraphs endpoint answers.
BY_NAMESPACE = {
    "type": "object",
    "additionalProperties": {
        "type": "object",
        "properties": {name: {"type": ["object", "null"]} for name in _SCHEMAS},
        "required": _SCHEMAS,
        "additionalProperties": False,
    },
}


class CountAssistants(Body):
    metadata = Filter()
    graph_id = ma.fields.String(allow_none=True)
    name = ma.fields.String(allow_none=True)


class SearchAssistants(CountAssistants, Sorted):
    sort_by = ma.fields.String(
        allow_none=True, load_default="created_at", validate=one_of(*SORT_COLUMNS)
    )
    select = StringList(allow_none=True, validate=ma.validate.ContainsOnly(ASSISTANT_FIELDS))
