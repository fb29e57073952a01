"""Writes what the user has said into the store, under the user's namespace."""

from __future__ import annotations

from langgraph.graph import START, MessagesState, StateGraph
from langgraph.runtime import Runtime


async def remember(state: MessagesState, runtime: Runtime, config) -> dict:
    user = config["configurable"]["user_id"]
    for message in state["messages"]:
        if message.type == "human":
            await runtime.store.aput(("memories", user), message.id, {"text": message.content})
    return {}


graph = StateGraph(MessagesState).add_node(remember).add_edge(START, "remember").compile()
