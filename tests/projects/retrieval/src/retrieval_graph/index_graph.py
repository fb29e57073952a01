"""Adds the documents of its input to a user's index, and deletes them from the state."""

from __future__ import annotations

from langchain_core.runnables import RunnableConfig
from langgraph.graph import StateGraph

from retrieval_graph import retrieval
from retrieval_graph.configuration import IndexConfiguration
from retrieval_graph.state import IndexState


async def index_docs(state: IndexState, *, config: RunnableConfig) -> dict[str, str]:
    with retrieval.make_retriever(config) as retriever:
        retriever.add(list(state.docs))
    return {"docs": "delete"}


builder = StateGraph(IndexState, context_schema=IndexConfiguration)
builder.add_node(index_docs)
builder.add_edge("__start__", "index_docs")
graph = builder.compile()
graph.name = "IndexGraph"
