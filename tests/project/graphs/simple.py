from __future__ import annotations

import contextlib
import os
from typing import TypedDict

from langchain_core.messages import AIMessage
from langgraph.graph import END, START, MessagesState, StateGraph


class Count(TypedDict, total=False):
    count: int
    by: int
    note: str


def _counter(by: int = 1) -> StateGraph:
    def inc(state: Count, config) -> Count:
        step = config["configurable"].get("by", by)
        return {"count": state.get("count", 0) + step}

    return StateGraph(Count).add_node("inc", inc).add_edge(START, "inc").add_edge("inc", END)


counter = _counter().compile()
uncompiled = _counter()


def make_sync():
    return _counter(by=10).compile()


async def make_async():
    return _counter(by=20)


def make_with_config(config):
    return _counter(by=config["configurable"].get("start_by", 30)).compile()


@contextlib.asynccontextmanager
async def make_in_context(config):
    yield _counter(by=40).compile()


def _raise(state: Count) -> Count:
    raise ValueError("boom from bad node")


bad = StateGraph(Count).add_node("bad", _raise).add_edge(START, "bad").compile()


async def _echo(state: MessagesState) -> dict:
    return {"messages": [AIMessage(f"echo: {state['messages'][-1].content}")]}


chat = StateGraph(MessagesState).add_node("echo", _echo).add_edge(START, "echo").compile()


def _where(state: Count) -> Count:
    return {"note": f"{os.getppid()} {os.environ.get('BELAY_TEST_PROJECT')}"}


heavy = StateGraph(Count).add_node("where", _where).add_edge(START, "where").compile()
