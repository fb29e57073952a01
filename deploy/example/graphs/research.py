"""A graph with a subgraph: the outer one plans and reports, the inner one looks each topic up.

Input: `{"question": "…"}`.
"""

from __future__ import annotations

import asyncio
import operator
from typing import Annotated, TypedDict

from langgraph.graph import END, START, StateGraph

_SHELF = {
    "belay": "To belay is to hold a climber safe, and to take an order back.",
    "run": "A run is one request to execute an assistant on a thread.",
    "thread": "A thread holds the state of a conversation between runs.",
}


class LookUp(TypedDict, total=False):
    topics: list[str]
    notes: Annotated[list[str], operator.add]


async def read(state: LookUp) -> LookUp:
    await asyncio.sleep(0.05)
    return {"notes": [_SHELF[topic] for topic in state["topics"] if topic in _SHELF]}


look_up = StateGraph(LookUp).add_node("read", read).add_edge(START, "read").compile()


class State(TypedDict, total=False):
    question: str
    topics: list[str]
    notes: Annotated[list[str], operator.add]
    report: str


def plan(state: State) -> State:
    words = state.get("question", "").lower().replace("?", "").split()
    return {"topics": [word for word in words if word in _SHELF]}


def report(state: State) -> State:
    return {"report": " ".join(state.get("notes", [])) or "Nothing found."}


graph = (
    StateGraph(State)
    .add_node("plan", plan)
    .add_node("look_up", look_up)
    .add_node("report", report)
    .add_edge(START, "plan")
    .add_edge("plan", "look_up")
    .add_edge("look_up", "report")
    .add_edge("report", END)
    .compile(name="research")
)
