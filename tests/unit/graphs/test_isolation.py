"""Test where the runs of graphs are executed, by the configuration or by their nodes."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import TypedDict

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import AgentMiddleware
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.runnables import RunnableLambda
from langchain_core.tools import BaseTool, tool
from langgraph.func import entrypoint
from langgraph.graph import START, StateGraph

from belay_server.graphs.isolation import isolation_of, may_share
from belay_server.graphs.synchronous_nodes import synchronous_node


class Graphs(SimpleNamespace):
    """Loaded graphs, and one that a factory makes."""

    def compiled(self, graph_id):
        return {
            "auto": graph_with(asynchronous),
            "silent": graph_with(synchronous),
        }.get(graph_id)


PROJECT = SimpleNamespace(
    graphs={
        "shared": SimpleNamespace(isolation="shared"),
        "process": SimpleNamespace(isolation="process"),
        "auto": SimpleNamespace(isolation="auto"),
        "silent": SimpleNamespace(isolation=None),
        "made": SimpleNamespace(isolation=None),
        "agent": SimpleNamespace(isolation="shared"),
    },
    agent_runs_graph="agent",
)


@pytest.mark.parametrize(
    ("graph_id", "default", "debug_port", "is_shared", "reason"),
    [
        ("shared", "process", 0, True, "isolation in langgraph.json"),
        ("shared", "process", 5678, False, "a debugger"),
        ("process", "shared", 0, False, "isolation in langgraph.json"),
        ("silent", "shared", 0, True, "BELAY_ISOLATION"),
        ("silent", "process", 0, False, "BELAY_ISOLATION"),
        ("silent", "auto", 0, False, "the node second is synchronous"),
        ("auto", "process", 0, True, "all nodes are asynchronous"),
        ("auto", "auto", 5678, False, "a debugger"),
        ("made", "auto", 0, False, "a factory"),
        ("agent", "shared", 0, False, "agent runs"),
    ],
)
def test_a_graph_shares_hosts_as_configured_or_if_its_nodes_allow_it(
    graph_id, default, debug_port, is_shared, reason
):
    settings = SimpleNamespace(isolation=default, debug_port=debug_port)
    found = isolation_of(settings, Graphs(project=PROJECT), graph_id)
    assert found.is_shared is is_shared
    assert reason in found.reason


@pytest.mark.parametrize(
    ("declared", "default", "expected"),
    [
        (None, "process", False),
        ("process", "shared", False),
        (None, "auto", True),
        ("shared", "process", True),
    ],
)
def test_a_project_may_share_hosts_unless_each_graph_has_processes(declared, default, expected):
    project = SimpleNamespace(graphs={"one": SimpleNamespace(isolation=declared)})
    assert may_share(SimpleNamespace(isolation=default), project) is expected


class State(TypedDict):
    a: int


async def asynchronous(state: State) -> State:
    return state


def synchronous(state: State) -> State:
    return state


class AsynchronousCall:
    async def __call__(self, state: State) -> State:
        return state


def generating(state: State):
    yield state


async def generating_asynchronously(state: State):
    yield state


def graph_with(node):
    graph = StateGraph(State).add_node("first", asynchronous).add_node("second", node)
    graph.add_conditional_edges("first", lambda _state: "second", ["second"])
    return graph.add_edge(START, "first").compile()


@tool
def synchronous_tool(text: str) -> str:
    """Return the text."""
    return text


@tool
async def asynchronous_tool(text: str) -> str:
    """Return the text."""
    return text


class ToolOfItsOwn(BaseTool):
    name: str = "own"
    description: str = "Returns nothing."

    def _run(self) -> None:
        return None


class AsynchronousToolOfItsOwn(ToolOfItsOwn):
    async def _arun(self) -> None:
        return None


class Before(AgentMiddleware):
    def before_model(self, *_):
        return None


class BeforeAsynchronously(AgentMiddleware):
    async def abefore_model(self, *_):
        return None


class Model(GenericFakeChatModel):
    def bind_tools(self, *_args, **_options):
        return self


def agent(*tools, middleware=()):
    return create_agent(Model(messages=iter([])), list(tools), middleware=list(middleware))


def entry(state: int) -> int:
    return state


async def asynchronous_entry(state: int) -> int:
    return state


@pytest.mark.parametrize(
    ("graph", "expected"),
    [
        (graph_with(asynchronous), None),
        (graph_with(synchronous), "second"),
        (graph_with(lambda state: state), "second"),
        (graph_with(partial(asynchronous)), None),
        (graph_with(AsynchronousCall()), None),
        (graph_with(generating), "second"),
        (graph_with(generating_asynchronously), None),
        (graph_with(RunnableLambda(synchronous, afunc=asynchronous)), None),
        (graph_with(RunnableLambda(synchronous).with_config(tags=["a"])), "second"),
        (graph_with(RunnableLambda(asynchronous) | synchronous), "second"),
        (graph_with(RunnableLambda(asynchronous) | asynchronous), None),
        (graph_with({"a": synchronous, "b": asynchronous}), "second"),
        (graph_with({"a": asynchronous, "b": asynchronous}), None),
        (graph_with(graph_with(asynchronous)), None),
        (graph_with(graph_with(synchronous)), "second:second"),
        (agent(), None),
        (agent(asynchronous_tool, AsynchronousToolOfItsOwn()), None),
        (agent(asynchronous_tool, synchronous_tool), "tools"),
        (agent(ToolOfItsOwn()), "tools"),
        (agent(middleware=[Before()]), "Before.before_model"),
        (agent(middleware=[BeforeAsynchronously()]), None),
        (entrypoint()(entry), "entry"),
        (entrypoint()(asynchronous_entry), None),
    ],
)
def test_a_node_without_an_asynchronous_implementation_is_found(graph, expected):
    assert synchronous_node(graph) == expected
