"""The schemas of assistants."""

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
    """A version of an assistant."""

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
    """An assistant with its latest version."""

    updated_at = ma.fields.DateTime(required=True)


class SelectedAssistant(Selected, Assistant):
    """An assistant with the selected fields; with all, if none are selected."""


class CreateAssistant(Body):
    """The body of a create: a graph and its configuration."""

    graph_id = ma.fields.String(required=True)
    assistant_id = Uuid()
    name = ma.fields.String(allow_none=True)
    description = ma.fields.String(allow_none=True)
    config = ma.fields.Nested(RunConfig, allow_none=True)
    context = Object(allow_none=True)
    metadata = Object(allow_none=True)
    if_exists = ma.fields.String(validate=one_of("raise", "do_nothing"), load_default="raise")


class PatchAssistant(Body):
    """A change: metadata is merged, the other given fields are replaced."""

    graph_id = ma.fields.String(allow_none=True)
    name = ma.fields.String(allow_none=True)
    description = ma.fields.String(allow_none=True)
    config = ma.fields.Nested(RunConfig, allow_none=True)
    context = Object(allow_none=True)
    metadata = Object(allow_none=True)


class ListVersions(Body, Paged):
    """The page of versions to list, and the metadata that each of them contains."""

    metadata = Filter()


class SetLatest(Body):
    """The number of the version to make the current one."""

    version = Integer(required=True, validate=ma.validate.Range(1, 2**31 - 1))


class DeleteAssistantQuery(ma.Schema):
    """The query of a delete. By default no threads are deleted."""

    delete_threads = ma.fields.String(
        metadata={"description": "true: also delete the threads whose last run used the assistant."}
    )


class GraphQuery(ma.Schema):
    """The query of a drawing. By default subgraphs are drawn as single nodes."""

    xray = ma.fields.String(
        metadata={"description": "true, or the number of levels of subgraphs to draw."}
    )


class SubgraphsQuery(ma.Schema):
    """The query for subgraphs. By default all subgraphs of the graph itself are returned."""

    namespace = ma.fields.String(metadata={"description": "Only the subgraph with this namespace."})
    recurse = ma.fields.String(metadata={"description": "true: include nested subgraphs."})


class Drawing(ma.Schema):
    """A graph's nodes and edges, as `Graph.to_json` of `langchain_core` returns them."""

    nodes = ma.fields.List(Object(), required=True)
    edges = ma.fields.List(Object(), required=True)


class GraphSchemas(ma.Schema):
    """JSON schemas of a graph; null for types that cannot be described."""

    graph_id = ma.fields.String(required=True)
    input_schema = Object(required=True, allow_none=True)
    output_schema = Object(required=True, allow_none=True)
    state_schema = Object(required=True, allow_none=True)
    config_schema = Object(required=True, allow_none=True)
    context_schema = Object(required=True, allow_none=True)


_SCHEMAS = [name for name in GraphSchemas._declared_fields if name != "graph_id"]
#: The response schema of the subgraphs endpoint.
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
    """The conditions of a count. `name` matches a part of the name, in upper or lower case."""

    metadata = Filter()
    graph_id = ma.fields.String(allow_none=True)
    name = ma.fields.String(allow_none=True)


class SearchAssistants(CountAssistants, Sorted):
    """The conditions of a search, its page and order, and the fields to return (all if null)."""

    sort_by = ma.fields.String(
        allow_none=True, load_default="created_at", validate=one_of(*SORT_COLUMNS)
    )
    select = StringList(allow_none=True, validate=ma.validate.ContainsOnly(ASSISTANT_FIELDS))
