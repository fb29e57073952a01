"""Graphs that read and write a store."""

from __future__ import annotations

import asyncio
from typing import TypedDict

from langgraph.config import get_store
from langgraph.graph import START, StateGraph
from langgraph.store.base import BaseStore
from langgraph_sdk.runtime import ServerRuntime


class State(TypedDict, total=False):
    note: str
    seconds: float
    found: list[str]


async def write(state: State, *, store: BaseStore) -> State:
    await store.aput(("notes",), state["note"], {"text": state["note"]})
    await asyncio.sleep(state.get("seconds", 0))
    return {"found": sorted(item.key for item in await store.asearch(("notes",)))}


def sync_write(state: State) -> State:
    store = get_store()
    store.put(("notes",), state["note"], {"text": state["note"]})
    return {"found": sorted(item.key for item in store.search(("notes",)))}


def _graph(node):
    return StateGraph(State).add_node("write", node).add_edge(START, "write")


graph = _graph(write).compile()
sync_graph = _graph(sync_write).compile()


async def make_graph(runtime: ServerRuntime):
    """Make a graph whose name tells how many notes there are."""
    found = await runtime.store.asearch(("notes",))
    return _graph(write).compile(name=f"{len(found)} notes")
