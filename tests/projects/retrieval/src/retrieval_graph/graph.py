"""Answers a question with the documents that a search finds."""

from __future__ import annotations

from langchain_core.runnables import RunnableConfig
from langchain_openai import ChatOpenAI
from langgraph.graph import StateGraph

from retrieval_graph import retrieval
from retrieval_graph.configuration import Configuration
from retrieval_graph.state import InputState, State


async def generate_query(state: State, *, config: RunnableConfig) -> dict[str, list[str]]:
    configuration = Configuration.from_runnable_config(config)
    question = str(state.messages[-1].content)
    if len(state.messages) == 1:
        return {"queries": [question]}
    model = ChatOpenAI(model=configuration.query_model)
    said = await model.ainvoke([("system", "; ".join(state.queries)), ("user", question)], config)
    return {"queries": [f"{question} {said.content}"]}


async def retrieve(state: State, *, config: RunnableConfig) -> dict[str, list]:
    with retrieval.make_retriever(config) as retriever:
        return {"retrieved_docs": await retriever.ainvoke(state.queries[-1], config)}


async def respond(state: State, *, config: RunnableConfig) -> dict[str, list]:
    configuration = Configuration.from_runnable_config(config)
    found = "\n".join(one.page_content for one in state.retrieved_docs)
    model = ChatOpenAI(model=configuration.query_model)
    said = await model.ainvoke([("system", found), *state.messages], config)
    return {"messages": [said]}


builder = StateGraph(State, input_schema=InputState, context_schema=Configuration)
builder.add_node(generate_query)
builder.add_node(retrieve)
builder.add_node(respond)
builder.add_edge("__start__", "generate_query")
builder.add_edge("generate_query", "retrieve")
builder.add_edge("retrieve", "respond")
graph = builder.compile(interrupt_before=[], interrupt_after=[])
graph.name = "RetrievalGraph"
