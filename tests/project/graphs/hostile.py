"""A node that follows its input: it writes to the store, returns large values, or raises errors."""

from __future__ import annotations

import json
import time
from typing import Any, TypedDict

from langgraph.config import get_store
from langgraph.graph import START, StateGraph


class State(TypedDict, total=False):
    label: str
    size: int
    message: str
    #: JSON within a string may have what the API refuses: NUL characters and lone surrogates.
    escaped: str
    unprintable: bool
    seconds: float
    text: str
    data: list[Any]


class Unprintable(Exception):
    def __str__(self) -> str:
        raise KeyError("no message")


def obey(state: State) -> dict[str, Any]:
    if "label" in state:
        get_store().put((state["label"],), "key", {"text": "x"})
    if "escaped" in state:
        raise ValueError(f"cannot parse {json.loads(state['escaped'])}")
    if state.get("unprintable"):
        raise Unprintable
    if "message" in state:
        raise ValueError(state["message"] * state.get("size", 1))
    time.sleep(state.get("seconds", 0))
    return {"text": "x" * state.get("size", 1)}


graph = StateGraph(State).add_node("obey", obey).add_edge(START, "obey").compile()
