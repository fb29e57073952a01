"""A graph with a human in the loop: it interrupts for an approval and resumes with the answer.

Input: `{"request": "…"}`. Resume with `{"command": {"resume": true}}` or `false`.
"""

from __future__ import annotations

from typing import TypedDict

from langgraph.graph import END, START, StateGraph
from langgraph.types import interrupt


class State(TypedDict, total=False):
    """A request, whether it was approved, and the result."""

    request: str
    approved: bool
    result: str


def ask(state: State) -> State:
    """Interrupt the run with a question. When it is resumed, return the answer."""
    answer = interrupt({"question": f"Approve '{state.get('request', '')}'?"})
    return {"approved": bool(answer)}


def act(state: State) -> State:
    """Return the result: `done` for an approved request, else `declined`."""
    return {"result": "done" if state["approved"] else "declined"}


graph = (
    StateGraph(State)
    .add_node("ask", ask)
    .add_node("act", act)
    .add_edge(START, "ask")
    .add_edge("ask", "act")
    .add_edge("act", END)
    .compile(name="approval")
)
