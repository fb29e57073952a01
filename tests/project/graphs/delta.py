"""A graph whose state is stored as deltas."""

from __future__ import annotations

from typing import Annotated, Any, TypedDict

from langgraph.channels.delta import DeltaChannel
from langgraph.graph import START, StateGraph


def _appended(items: list[str], writes: list[list[str]]) -> list[str]:
    return [*items, *(item for write in writes for item in write)]


class State(TypedDict, total=False):
    items: Annotated[list[str], DeltaChannel(_appended)]


def _add(state: State) -> dict[str, Any]:
    return {"items": [f"{len(state['items'])} so far"]}


graph = StateGraph(State).add_node("add", _add).add_edge(START, "add").compile()
