"""Graphs that count, ask, and count again."""

from __future__ import annotations

import asyncio
import operator
import os
from typing import Annotated, TypedDict

from langgraph.graph import START, StateGraph
from langgraph.types import interrupt


class State(TypedDict, total=False):
    counts: Annotated[list[str], operator.add]
    asks: bool
    pids: Annotated[list[int], operator.add]
    seconds: float


async def first(state: State) -> State:
    return {"counts": ["first"], "pids": [os.getpid()]}


async def second(state: State) -> State:
    answers = [interrupt("how many?"), interrupt("sure?")] if state.get("asks") else []
    await asyncio.sleep(state.get("seconds", 0))
    return {"counts": ["second", *answers]}


def sync_first(state: State) -> State:
    return {"counts": ["first"]}


def sync_second(state: State) -> State:
    return {"counts": ["second"]}


def _graph(one, two):
    inner = StateGraph(State).add_node("second", two).add_edge(START, "second").compile()
    graph = StateGraph(State).add_node("first", one).add_node("inner", inner)
    return graph.add_edge(START, "first").add_edge("first", "inner").compile()


graph = _graph(first, second)
sync_graph = _graph(sync_first, sync_second)
