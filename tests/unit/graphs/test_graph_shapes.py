"""The schemas of a graph are made once, for as long as the graph lives."""

from __future__ import annotations

import gc
from weakref import WeakKeyDictionary

from langgraph.store.memory import InMemoryStore

from belay_server.graphs.graph_shapes import known_schemas_of, schemas_of
from belay_server.graphs.project.factories import GraphUse
from belay_server.graphs.project.langgraph_json import read_project
from belay_server.graphs.registry import GraphRegistry
from tests.servers import PROJECT

USE = GraphUse("assistants.read", {"configurable": {}}, store=InMemoryStore)


def test_the_schemas_of_a_loaded_graph_are_made_once():
    graphs = GraphRegistry.load(read_project(PROJECT))
    first = known_schemas_of(graphs.read("counter", USE), graphs.schemas)
    assert known_schemas_of(graphs.read("counter", USE), graphs.schemas) is first
    assert first == schemas_of(graphs.read("counter", USE))
    assert known_schemas_of(graphs.read("teller", USE), graphs.schemas) != first


def test_the_schemas_of_a_graph_of_a_factory_are_let_go_with_it():
    graphs = GraphRegistry.load(read_project(PROJECT))
    known = WeakKeyDictionary()
    known_schemas_of(graphs.read("made", USE), known)
    gc.collect()
    assert not known
