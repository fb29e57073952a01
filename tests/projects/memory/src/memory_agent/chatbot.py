"""A chat that has its memories written by another graph, some time after the last message."""

from __future__ import annotations

from langchain_openai import ChatOpenAI
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.runtime import Runtime
from langgraph_sdk import get_client


async def answer(state: MessagesState, runtime: Runtime, config) -> dict:
    user = config["configurable"]["user_id"]
    query = str(state["messages"][-1].content)
    found = await runtime.store.asearch(("memories", user), query=query, limit=2)
    known = "; ".join(item.value["text"] for item in found)
    model = ChatOpenAI(model="stand-in")
    said = await model.ainvoke([("system", f"Known: {known}"), *state["messages"]])
    said.additional_kwargs = {"known": known}
    return {"messages": [said]}


async def schedule(state: MessagesState, config) -> dict:
    """Write the memories after a pause. A run that still waits is replaced."""
    configurable = config["configurable"]
    client = get_client()
    await client.runs.create(
        thread_id=configurable["thread_id"],
        assistant_id="memory",
        input={"messages": []},
        multitask_strategy="enqueue",
        after_seconds=configurable.get("pause", 0),
        config={"configurable": {"user_id": configurable["user_id"]}},
    )
    return {}


graph = (
    StateGraph(MessagesState)
    .add_node(answer)
    .add_node(schedule)
    .add_edge(START, "answer")
    .add_edge("answer", "schedule")
    .compile()
)
