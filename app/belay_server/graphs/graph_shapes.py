"""What a graph looks like from outside: its drawing, its schemas, its subgraphs.

Asked of the loaded graph, never of a running one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any, get_type_hints

from langgraph.channels.base import BaseChannel
from langgraph.pregel import Pregel
from pydantic import create_model

from belay_server.graphs.registry import Graph

log = logging.getLogger(__name__)

JsonSchema = dict[str, Any]


def draw(graph: Graph, *, xray: int | bool) -> dict[str, Any]:
    """Nodes and edges. `xray`: subgraphs in their nodes' place, all or so many levels deep."""
    return graph.get_graph(xray=xray).to_json()


def schemas_of(graph: Graph) -> dict[str, JsonSchema | None]:
    """JSON schemas of what goes in, what comes out and what is kept. None where the graph's types
    cannot be described; a schema is help, and must not be what fails."""
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
    """Schemas of the subgraphs by namespace; those of one namespace, if it is named."""
    found = graph.get_subgraphs(namespace=namespace, recurse=recurse)
    return {name: schemas_of(subgraph) for name, subgraph in found if isinstance(subgraph, Pregel)}


def _first_of(*ways: Callable[[], JsonSchema | None]) -> JsonSchema | None:
    for way in ways:
        try:
            return way()
        except Exception as error:  # noqa: BLE001  (types of a project may be anything at all)
            log.debug("a schema cannot be made: %s", error)
    return None


def _context_schema(graph: Graph) -> JsonSchema | None:
    """What the context takes, and with it `config.configurable`: they are one."""
    return _first_of(
        graph.get_context_jsonschema,
        lambda: _schema_of_typed_dict(graph.context_schema),
    )


def _schema_of_typed_dict(kind: Any) -> JsonSchema:
    """Before Python 3.12, pydantic refuses `typing.TypedDict`: make a model of its keys."""
    hints = get_type_hints(kind, include_extras=True)
    required = getattr(kind, "__required_keys__", frozenset(hints))
    fields: dict[str, Any] = {
        name: (hint, ... if name in required else None) for name, hint in hints.items()
    }
    return create_model(kind.__name__, **fields).model_json_schema()


def _schema_of_channels(graph: Graph, channels: str | Iterable[str]) -> JsonSchema:
    names = [channels] if isinstance(channels, str) else list(channels)
    fields: dict[str, Any] = {}
    for name in names:
        channel = graph.channels[name]
        if isinstance(channel, BaseChannel):
            fields[name] = (channel.UpdateType, None)
    return create_model(graph.get_name("State"), **fields).model_json_schema()
