"""Agents that hand over to each other: a swarm with a memory of who is active, and a supervisor."""

from __future__ import annotations

from typing import Annotated, Literal

from langchain.agents import create_agent
from langchain.tools import ToolRuntime
from langchain_anthropic import ChatAnthropic
from langchain_core.messages import ToolMessage
from langchain_core.tools import tool
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.types import Command

model = ChatAnthropic(model="stand-in", max_tokens=100)


def handover(to: str):
    """Return a tool that goes to another agent of the parent graph."""

    @tool(f"to_{to}")
    def hand_over(runtime: ToolRuntime) -> Command:
        """Hand over to another agent."""
        done = ToolMessage(f"handed over to {to}", tool_call_id=runtime.tool_call_id)
        update = {"messages": [*runtime.state["messages"], done], "active": to}
        return Command(goto=to, update=update, graph=Command.PARENT)

    return hand_over


class Team(MessagesState):
    active: Annotated[str, lambda _, new: new]


def route(state: Team) -> Literal["alice", "bob"]:
    return state.get("active") or "alice"


def agent(name: str, to: str):
    return create_agent(model, tools=[handover(to)], name=name)


swarm = (
    StateGraph(Team)
    .add_node("alice", agent("alice", "bob"), destinations=("bob",))
    .add_node("bob", agent("bob", "alice"), destinations=("alice",))
    .add_conditional_edges(START, route)
    .compile()
)

supervised = (
    StateGraph(Team)
    .add_node("supervisor", agent("supervisor", "worker"), destinations=("worker",))
    .add_node("worker", create_agent(model, tools=[], name="worker"))
    .add_edge(START, "supervisor")
    .add_edge("worker", "supervisor")
    .compile()
)
