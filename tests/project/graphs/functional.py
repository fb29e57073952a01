"""LangGraph's functional API, and messages for a user interface."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated, Any, TypedDict

from langchain_core.messages import AIMessage, AnyMessage
from langgraph.func import entrypoint, task
from langgraph.graph import START, StateGraph
from langgraph.graph.message import add_messages
from langgraph.graph.ui import AnyUIMessage, push_ui_message, ui_message_reducer
from langgraph.types import interrupt

from .beats import beat


@task
async def add_one(total: int, beats: str | None, seconds: float) -> int:
    beat(beats, f"add{total}")
    await asyncio.sleep(seconds)
    return total + 1


@entrypoint()
async def ledger(given: dict[str, Any], *, previous: Any = None) -> Any:
    """Add to the total of the thread's earlier runs, in tasks, and ask before the end."""
    total = (previous or {}).get("total", 0)
    for _ in range(given["count"]):
        total = await add_one(total, given.get("beats"), given.get("seconds", 0.0))
    answer = interrupt({"total": total}) if given.get("asks") else "unasked"
    result = {"total": total, "answer": answer}
    return entrypoint.final(value=result, save={"total": total})


class Screen(TypedDict, total=False):
    messages: Annotated[list[AnyMessage], add_messages]
    ui: Annotated[Sequence[AnyUIMessage], ui_message_reducer]


async def _draw(state: Screen) -> Screen:
    said = AIMessage(content="here is a chart", id="said")
    push_ui_message("chart", {"points": [1, 2]}, message=said, id="chart-1")
    return {"messages": [said]}


#: Pushes a component for the user interface.
drawer = StateGraph(Screen).add_node("draw", _draw).add_edge(START, "draw").compile()
