"""A node that follows its input: it writes to the store, returns large values, or raises errors."""

from __future__ import annotations

import json
import time
from typing import Any, TypedDict

from langgraph.config import get_store
from langgraph.graph import START, StateGraph
from pydantic import BaseModel


class State(TypedDict, total=False):
    label: str
    size: int
    message: str
    #: JSON within a string may have what the API refuses: NUL characters and lone surrogates.
    escaped: str
    raises: str
    seconds: float
    text: str
    data: list[Any]


class Unprintable(Exception):
    def __str__(self) -> str:
        raise KeyError("no message")


class Panic(BaseException):
    """As the one that libraries in Rust raise."""


def obey(state: State) -> dict[str, Any]:
    if "label" in state:
        get_store().put((state["label"],), "key", {"text": "x"})
    if "escaped" in state:
        raise ValueError(f"cannot parse {json.loads(state['escaped'])}")
    if state.get("raises"):
        raise {"Unprintable": Unprintable, "Panic": Panic, "GeneratorExit": GeneratorExit}[
            state["raises"]
        ]("no way on")
    if "message" in state:
        raise ValueError(state["message"] * state.get("size", 1))
    time.sleep(state.get("seconds", 0))
    return {"text": "x" * state.get("size", 1)}


async def obey_async(state: State) -> dict[str, Any]:
    return obey(state)


class Strict(BaseModel):
    name: str


#: Its state's schema does not accept every input.
strict = (
    StateGraph(Strict)
    .add_node("greet", lambda state: {"name": f"hello {state.name}"})
    .add_edge(START, "greet")
    .compile()
)
graph = StateGraph(State).add_node("obey", obey).add_edge(START, "obey").compile()
graph_async = StateGraph(State).add_node("obey", obey_async).add_edge(START, "obey").compile()
