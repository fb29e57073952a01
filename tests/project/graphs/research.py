"""The graph of the agent runs tests: the first item of `input.data` controls what it does."""

from __future__ import annotations

import asyncio
from typing import Any, TypedDict

from langgraph.graph import END, START, StateGraph

from graphs.beats import beat


class State(TypedDict, total=False):
    query: str
    systemPrompt: str
    input: dict[str, Any]
    outputSchema: dict[str, Any]
    effort: str
    previousRunId: str
    text: Any
    structured: Any
    grounding: Any


class Output(TypedDict, total=False):
    text: Any
    structured: Any
    grounding: Any


def _told(state: State) -> dict[str, Any]:
    data = (state.get("input") or {}).get("data") or [{}]
    return data[0]


def begin(state: State) -> State:
    """Return the partial output that a run has if it is stopped during `work`."""
    told = _told(state)
    return {"text": told.get("first_text", ""), "structured": told.get("first_structured")}


async def work(state: State) -> State:
    told = _told(state)
    beat(told.get("beats"), "working")
    while told.get("stubborn"):
        try:
            await asyncio.sleep(60)
        except BaseException:
            continue
    await asyncio.sleep(told.get("seconds", 0))
    if "fail" in told:
        raise ValueError(told["fail"])
    seen = {key: value for key, value in state.items() if key not in Output.__annotations__}
    return {
        "text": told.get("text", f"done: {state['query']}"),
        "structured": seen if told.get("echo") else told.get("structured"),
        "grounding": told.get("grounding"),
    }


graph = (
    StateGraph(State, output_schema=Output)
    .add_node("begin", begin)
    .add_node("work", work)
    .add_edge(START, "begin")
    .add_edge("begin", "work")
    .add_edge("work", END)
    .compile()
)
