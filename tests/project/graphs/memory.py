"""Graphs that use the store in each way LangGraph offers."""

from __future__ import annotations

import time
from typing import Annotated, Any, TypedDict

from langgraph.config import get_store
from langgraph.graph import START, StateGraph
from langgraph.runtime import Runtime
from langgraph.store.base import BaseStore

from graphs.beats import beat


class State(TypedDict, total=False):
    user: str
    said: str
    beats: str
    seconds: float
    remembered: Annotated[list[str], lambda before, new: before + new]


def remember(state: State, *, store: BaseStore) -> State:
    """Put an item synchronously; the store is a parameter."""
    store.put(("memories", state["user"]), "sync", {"text": state["said"]})
    return {}


async def remember_async(state: State, runtime: Runtime[Any]) -> State:
    """Put an item asynchronously; the store is in the runtime."""
    assert runtime.store is not None
    await runtime.store.aput(("memories", state["user"]), "async", {"text": state["said"]})
    return {}


def recall(state: State) -> State:
    """Search through the store of the running config, as a tool would."""
    found = get_store().search(("memories", state["user"]), query=state["said"])
    return {"remembered": sorted(f"{item.key}: {item.value['text']}" for item in found)}


def put_for_long(state: State, *, store: BaseStore) -> State:
    """Put items continuously until the run is stopped."""
    beat(state.get("beats"), "put:start")
    until = time.monotonic() + state.get("seconds", 0.0)
    while time.monotonic() < until:
        store.put(("many", state["user"]), "last", {"at": time.monotonic()})
    return {}


graph = (
    StateGraph(State)
    .add_node("remember", remember)
    .add_node("remember_async", remember_async)
    .add_node("recall", recall)
    .add_edge(START, "remember")
    .add_edge("remember", "remember_async")
    .add_edge("remember_async", "recall")
    .compile()
)
busy = StateGraph(State).add_node("put", put_for_long).add_edge(START, "put").compile()
