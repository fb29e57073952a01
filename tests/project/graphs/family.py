"""A graph with a subgraph that has its own checkpoints and may interrupt."""

from __future__ import annotations

import asyncio
import operator
from typing import Annotated, TypedDict

from langgraph.config import get_stream_writer
from langgraph.graph import START, StateGraph
from langgraph.types import interrupt

from graphs.beats import beat


class State(TypedDict, total=False):
    ask: bool
    seconds: float
    beats: str
    log: Annotated[list[str], operator.add]


async def child_one(state: State) -> State:
    get_stream_writer()({"from": "child"})
    return {"log": ["c1"]}


async def child_two(state: State) -> State:
    if state.get("ask"):
        return {"log": [f"c2:{interrupt('child asks')}"]}
    beat(state.get("beats"), "child:start")
    await asyncio.sleep(state.get("seconds", 0.0))
    return {"log": ["c2"]}


child = (
    StateGraph(State)
    .add_node("child_one", child_one)
    .add_node("child_two", child_two)
    .add_edge(START, "child_one")
    .add_edge("child_one", "child_two")
    .compile(checkpointer=True)
)


#: A subgraph that pauses before its node, without a question.
pausing_child = (
    StateGraph(State)
    .add_node("child_one", child_one)
    .add_edge(START, "child_one")
    .compile(interrupt_before=["child_one"])
)
paused = StateGraph(State).add_node("child", pausing_child).add_edge(START, "child").compile()


async def parent_one(state: State) -> State:
    return {"log": ["p1"]}


async def parent_two(state: State) -> State:
    return {"log": ["p2"]}


graph = (
    StateGraph(State)
    .add_node("parent_one", parent_one)
    .add_node("child", child)
    .add_node("parent_two", parent_two)
    .add_edge(START, "parent_one")
    .add_edge("parent_one", "child")
    .add_edge("child", "parent_two")
    .compile()
)
