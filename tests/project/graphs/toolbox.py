"""A small agent: its model calls a tool, which reports progress and returns a result or fails."""

from __future__ import annotations

from langchain_core.messages import AIMessage
from langchain_core.tools import tool
from langgraph.config import get_stream_writer
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode


@tool
def double(number: int) -> int:
    """Twice as much."""
    get_stream_writer()({"name": "progress", "payload": {"half": number}})
    if number < 0:
        raise ValueError("no doubles below zero")
    return number * 2


def call(state: MessagesState) -> dict:
    number = int(state["messages"][-1].content)
    calls = [{"name": "double", "args": {"number": number}, "id": f"call-{number}"}]
    return {"messages": [AIMessage("let me see", tool_calls=calls)]}


graph = (
    StateGraph(MessagesState)
    .add_node("call", call)
    .add_node("tools", ToolNode([double], handle_tool_errors=False))
    .add_edge(START, "call")
    .add_edge("call", "tools")
    .compile()
)
