"""A graph whose node is another graph on an Agent Server, and one that emits many large events."""

from __future__ import annotations

from typing import TypedDict

from langgraph.graph import START, StateGraph
from langgraph.pregel.remote import RemoteGraph
from langgraph.runtime import Runtime


class Call(TypedDict, total=False):
    url: str
    graph: str
    count: int


async def _call(state: Call) -> Call:
    remote = RemoteGraph(state["graph"], url=state["url"])
    values = await remote.ainvoke({"count": state["count"]})
    return {"count": values["count"]}


#: Its runs wait for other runs, so they have a separate queue.
parent = StateGraph(Call).add_node("call", _call).add_edge(START, "call").compile()


class Flood(TypedDict, total=False):
    count: int
    size: int


async def _flood(state: Flood, runtime: Runtime) -> Flood:
    for n in range(state["count"]):
        runtime.stream_writer({"n": n, "text": "x" * state["size"]})
    return {}


flood = StateGraph(Flood).add_node("flood", _flood).add_edge(START, "flood").compile()
