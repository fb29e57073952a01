"""Four steps of `seconds` each, or of the seconds in `slow` by their names, which write their names
to the state and beats to a file."""

from __future__ import annotations

import asyncio
import operator
import time
from typing import Annotated, TypedDict

from langgraph.graph import START, StateGraph
from langgraph.types import RetryPolicy

from graphs.beats import beat


class State(TypedDict, total=False):
    seconds: float
    slow: dict[str, float]
    beats: str
    tag: str
    steps: Annotated[list[str], operator.add]


_BEAT_SECONDS = 0.05


def _seconds(state: State, name: str) -> float:
    return state.get("slow", {}).get(name, state.get("seconds", 0.0))


def _async_step(name: str):
    async def step(state: State) -> State:
        tag = state.get("tag", "")
        beat(state.get("beats"), f"{tag}{name}:start")
        until = time.monotonic() + _seconds(state, name)
        while time.monotonic() < until:
            await asyncio.sleep(min(_BEAT_SECONDS, max(0.0, until - time.monotonic())))
            beat(state.get("beats"), f"{tag}{name}:beat")
        beat(state.get("beats"), f"{tag}{name}:end")
        return {"steps": [name]}

    return step


def _sync_step(name: str):
    def step(state: State) -> State:
        tag = state.get("tag", "")
        beat(state.get("beats"), f"{tag}{name}:start")
        until = time.monotonic() + _seconds(state, name)
        while time.monotonic() < until:
            time.sleep(min(_BEAT_SECONDS, max(0.0, until - time.monotonic())))
            beat(state.get("beats"), f"{tag}{name}:beat")
        beat(state.get("beats"), f"{tag}{name}:end")
        return {"steps": [name]}

    return step


def chain(state, make):
    """Return a graph of four nodes in sequence; `make` returns the node for a name."""
    graph = StateGraph(state)
    before = START
    for name in ("s1", "s2", "s3", "s4"):
        graph.add_node(name, make(name))
        graph.add_edge(before, name)
        before = name
    return graph.compile()


def _fail(state: State) -> State:
    beat(state.get("beats"), "try")
    raise ConnectionError("not yet")


retrying = (
    StateGraph(State)
    .add_node(
        "fail",
        _fail,
        retry_policy=RetryPolicy(
            initial_interval=0.1, backoff_factor=1.0, jitter=False, max_attempts=1000
        ),
    )
    .add_edge(START, "fail")
    .compile()
)
steps = chain(State, _async_step)
sync_steps = chain(State, _sync_step)
