"""Searches in parallel, in synchronous nodes, until its own reflection says that it is enough."""

from __future__ import annotations

from operator import add
from typing import Annotated, Any, TypedDict

from langchain_core.messages import AIMessage
from langchain_core.runnables import RunnableConfig
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph, add_messages
from langgraph.types import Send
from pydantic import BaseModel, Field


class SearchQueryList(BaseModel):
    query: list[str] = Field(description="Search queries")
    rationale: str = ""


class Reflection(BaseModel):
    is_sufficient: bool
    follow_up_queries: list[str] = Field(default_factory=list)


class OverallState(TypedDict, total=False):
    messages: Annotated[list, add_messages]
    search_query: Annotated[list, add]
    web_research_result: Annotated[list, add]
    sources_gathered: Annotated[list, add]
    max_research_loops: int
    research_loop_count: int
    is_sufficient: bool
    follow_up_queries: list


class WebSearchState(TypedDict):
    search_query: str
    id: str


def _model() -> ChatOpenAI:
    return ChatOpenAI(model="stand-in")


def generate_query(state: OverallState, config: RunnableConfig) -> dict[str, Any]:
    queries = _model().with_structured_output(SearchQueryList, method="function_calling")
    return {"search_query": queries.invoke(state["messages"][-1].content).query}


def continue_to_web_research(state: OverallState) -> list[Send]:
    queries = enumerate(state["search_query"])
    return [Send("web_research", {"search_query": one, "id": str(i)}) for i, one in queries]


def web_research(state: WebSearchState, config: RunnableConfig) -> dict[str, Any]:
    said = _model().invoke(state["search_query"])
    return {"sources_gathered": [state["id"]], "web_research_result": [said.content]}


def reflection(state: OverallState, config: RunnableConfig) -> dict[str, Any]:
    loops = state.get("research_loop_count", 0) + 1
    enough = loops >= state.get("max_research_loops", 1)
    verdict = Reflection(is_sufficient=enough, follow_up_queries=[f"say {loops}"])
    return {"research_loop_count": loops, **verdict.model_dump()}


def evaluate_research(state: OverallState, config: RunnableConfig) -> Any:
    if state["is_sufficient"]:
        return "finalize_answer"
    queries = enumerate(state["follow_up_queries"], len(state["search_query"]))
    return [Send("web_research", {"search_query": one, "id": str(i)}) for i, one in queries]


def finalize_answer(state: OverallState, config: RunnableConfig) -> dict[str, Any]:
    text = "\n".join(state["web_research_result"])
    return {"messages": [AIMessage(text)]}


builder = StateGraph(OverallState)
builder.add_node("generate_query", generate_query)
builder.add_node("web_research", web_research)
builder.add_node("reflection", reflection)
builder.add_node("finalize_answer", finalize_answer)
builder.add_edge(START, "generate_query")
builder.add_conditional_edges("generate_query", continue_to_web_research, ["web_research"])
builder.add_edge("web_research", "reflection")
builder.add_conditional_edges("reflection", evaluate_research, ["web_research", "finalize_answer"])
builder.add_edge("finalize_answer", END)
graph = builder.compile(name="pro-search-agent")
