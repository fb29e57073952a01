"""The graphs of `make bench`. Any Agent Server can serve them, so that two can be compared."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, TypedDict

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langgraph.graph import END, START, MessagesState, StateGraph

TOKENS = 200


class State(TypedDict, total=False):
    count: int
    seconds: float


async def _add(state: State) -> State:
    return {"count": state.get("count", 0) + 1}


async def _sleep(state: State) -> State:
    await asyncio.sleep(0.5)
    return {"count": state.get("count", 0) + 1}


async def _idle(state: State) -> State:
    await asyncio.sleep(state.get("seconds", 600))
    return {}


class _Talkative(BaseChatModel):
    """A model that returns TOKENS tokens, as fast as they are consumed."""

    @property
    def _llm_type(self) -> str:
        return "talkative"

    def _generate(self, messages: list[BaseMessage], *_: Any, **__: Any) -> ChatResult:
        text = "".join(f"token{n} " for n in range(TOKENS))
        return ChatResult(generations=[ChatGeneration(message=AIMessage(text))])

    async def _astream(self, messages: Any, *_: Any, **__: Any) -> AsyncIterator[Any]:
        for n in range(TOKENS):
            yield ChatGenerationChunk(message=AIMessageChunk(content=f"token{n} "))


_model = _Talkative()


async def _talk(state: MessagesState) -> dict[str, Any]:
    return {"messages": [await _model.ainvoke(state["messages"])]}


trivial = (
    StateGraph(State).add_node("add", _add).add_edge(START, "add").add_edge("add", END).compile()
)

sleeper = (
    StateGraph(State)
    .add_sequence([(f"sleep{n}", _sleep) for n in range(4)])
    .add_edge(START, "sleep0")
    .compile()
)
talker = StateGraph(MessagesState).add_node("talk", _talk).add_edge(START, "talk").compile()
#: The run of the scenario `listeners`.
idler = StateGraph(State).add_node("idle", _idle).add_edge(START, "idle").compile()
