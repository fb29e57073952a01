"""A chat agent with a tool loop: model, tool, model, until the model has an answer.

A message that contains "long" makes it wait for a minute, in steps of 0.1 s. Such a run can be used
to try a cancel.
"""

from __future__ import annotations

import asyncio

from langchain_core.messages import AnyMessage
from langchain_core.tools import tool
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode

from graphs.model import DeterministicModel

_STEPS, _STEP_SECONDS = 600, 0.1


@tool
def calculate(left: int, operator: str, right: int) -> int:
    """Add, subtract or multiply two whole numbers."""
    if operator == "+":
        return left + right
    return left - right if operator == "-" else left * right


async def think(state: MessagesState) -> dict[str, list[AnyMessage]]:
    """Wait for a minute if the last message contains "long"."""
    if "long" in str(state["messages"][-1].content).lower():
        for _ in range(_STEPS):
            await asyncio.sleep(_STEP_SECONDS)
    return {}


async def call_model(state: MessagesState) -> dict[str, list[AnyMessage]]:
    """Return the model's next message: an answer, or a call of the tool."""
    model = DeterministicModel().bind_tools([calculate])
    return {"messages": [await model.ainvoke(state["messages"])]}


def wants_tool(state: MessagesState) -> str:
    """Return the node that follows the model: `tools` for a tool call, else END."""
    return "tools" if getattr(state["messages"][-1], "tool_calls", None) else END


graph = (
    StateGraph(MessagesState)
    .add_node("think", think)
    .add_node("model", call_model)
    .add_node("tools", ToolNode([calculate]))
    .add_edge(START, "think")
    .add_edge("think", "model")
    .add_conditional_edges("model", wants_tool, ["tools", END])
    .add_edge("tools", "model")
    .compile(name="agent")
)
