"""Descriptions of a graph: its drawing, its schemas, its subgraphs.

They are read from the loaded graph, never from a running one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, MutableMapping
from typing import Any, get_type_hints

from langgraph.channels.base import BaseChannel
from langgraph.pregel import Pregel
from pydantic import create_model

from belay_server.graphs.registry import Graph

log = logging.getLogger(__name__)

JsonSchema = dict[str, Any]


def draw(graph: Graph, *, xray: int | bool) -> dict[str, Any]:
    """Return nodes and edges. `xray` shows subgraphs in place of their nodes: all of them, or down
    to that many levels."""
    return graph.get_graph(xray=xray).to_json()


def known_schemas_of(
    graph: Graph, known: MutableMapping[Graph, dict[str, Any]]
) -> dict[str, JsonSchema | None]:
    """Return the schemas of a graph from those that are known. To make them takes up to 70 ms, and
    some user interfaces read them before each run."""
    found = known.get(graph)
    if found is None:
        found = known[graph] = schemas_of(graph)
    return found


def schemas_of(graph: Graph) -> dict[str, JsonSchema | None]:
    """Return JSON schemas of a graph's input, output, state and context.

    A schema is None (`config_schema`: {}) if the types have no description: it is optional, and
    must not fail the request.
    """
    builder = getattr(graph, "builder", None)
    return {
        "input_schema": _first_of(
            graph.get_input_jsonschema,
            lambda: _schema_of_typed_dict(builder.input_schema),  # type: ignore[union-attr]
            lambda: _schema_of_channels(graph, graph.input_channels),
        ),
        "output_schema": _first_of(
            graph.get_output_jsonschema,
            lambda: _schema_of_channels(graph, graph.output_channels),
        ),
        "state_schema": _first_of(lambda: _schema_of_channels(graph, graph.stream_channels_list)),
        "config_schema": _context_schema(graph) or {},
        "context_schema": _context_schema(graph),
    }


def subgraphs_of(
    graph: Graph, *, namespace: str | None, recurse: bool
) -> dict[str, dict[str, JsonSchema | None]]:
    """Return the schemas of the subgraphs by namespace, or those of the given namespace only."""
    found = graph.get_subgraphs(namespace=namespace, recurse=recurse)
    return {name: schemas_of(subgraph) for name, subgraph in found if isinstance(subgraph, Pregel)}


def _first_of(*ways: Callable[[], JsonSchema | None]) -> JsonSchema | None:
    for way in ways:
        try:
            return way()
        except Exception as error:  # noqa: BLE001  (types of a project may be anything)
            log.debug("cannot make a schema, trying the next way or leaving it out: %s", error)
    return None


def _context_schema(graph: Graph) -> JsonSchema | None:
    """Return the schema of the context, which is also that of `config.configurable`."""
    return _first_of(
        graph.get_context_jsonschema,
        lambda: _schema_of_typed_dict(graph.context_schema),
    )


def _schema_of_typed_dict(kind: Any) -> JsonSchema:
    """Return the schema of a model with the keys of a TypedDict. Before Python 3.12, pydantic does
    not accept `typing.TypedDict`."""
    hints = get_type_hints(kind, include_extras=True)
    required = getattr(kind, "__required_keys__", frozenset(hints))
    fields: dict[str, Any] = {
        name: (hint, ... if name in required else None) for name, hint in hints.items()
    }
    schema: JsonSchema = create_model(kind.__name__, **fields).model_json_schema()
    return schema


def _schema_of_channels(graph: Graph, channels: str | Iterable[str]) -> JsonSchema:
    names = [channels] if isinstance(channels, str) else list(channels)
    fields: dict[str, Any] = {}
    for name in names:
        channel = graph.channels[name]
        if isinstance(channel, BaseChannel):
            fields[name] = (channel.UpdateType, None)
    schema: JsonSchema = create_model(graph.get_name("State"), **fields).model_json_schema()
    return schema
