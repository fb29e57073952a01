"""A long task of four steps with a checkpoint after each, to cancel and resume.

Input: `{"seconds": 1.0}`, the duration of each step.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Callable
from typing import Annotated, TypedDict

from langgraph.config import get_stream_writer
from langgraph.graph import END, START, StateGraph


class State(TypedDict, total=False):
    """The duration of each step in seconds, and the names of the finished steps."""

    seconds: float
    steps: Annotated[list[str], operator.add]


def _step(name: str) -> Callable[..., State]:
    def work(state: State) -> State:
        """Run one step. In a synchronous node a cancel raises an exception, so `finally` runs."""
        get_stream_writer()({"started": name})
        try:
            time.sleep(state.get("seconds", 1.0))
        finally:
            get_stream_writer()({"left": name})
        return {"steps": [name]}

    return work


graph = (
    StateGraph(State)
    .add_node("collect", _step("collect"))
    .add_node("sort", _step("sort"))
    .add_node("write", _step("write"))
    .add_node("check", _step("check"))
    .add_edge(START, "collect")
    .add_edge("collect", "sort")
    .add_edge("sort", "write")
    .add_edge("write", "check")
    .add_edge("check", END)
    .compile(name="long_task")
)
