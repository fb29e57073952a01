"""A graph that interrupts twice in one node: the first resume leads to the second interrupt."""

from __future__ import annotations

import operator
import time
from typing import Annotated, TypedDict

from langgraph.graph import START, StateGraph
from langgraph.types import interrupt

from graphs.beats import beat


class State(TypedDict, total=False):
    topic: str
    beats: str
    seconds: float
    answers: Annotated[list[str], operator.add]


def prepare(state: State) -> State:
    return {"answers": ["prepared"]}


def ask(state: State) -> State:
    first = interrupt({"question": f"first about {state['topic']}?"})
    second = interrupt({"question": f"second about {state['topic']}?"})
    return {"answers": [first, second]}


def work(state: State) -> State:
    beat(state.get("beats"), "work:start")
    time.sleep(state.get("seconds", 0.0))
    return {"answers": ["worked"]}


graph = (
    StateGraph(State)
    .add_node("prepare", prepare)
    .add_node("ask", ask)
    .add_node("work", work)
    .add_edge(START, "prepare")
    .add_edge("prepare", "ask")
    .add_edge("ask", "work")
    .compile()
)
