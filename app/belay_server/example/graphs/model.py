"""A deterministic chat model that needs neither a network nor an API key.

Replace it by a real one (`from langchain.chat_models import init_chat_model`); the graphs need no
other change.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ToolCallChunk,
    ToolMessage,
)
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult

_SUM = re.compile(r"(-?\d+)\s*([+*-])\s*(-?\d+)")


class DeterministicModel(BaseChatModel):
    """Calls the `calculate` tool if a message has an arithmetic expression, else repeats it."""

    #: The time between two streamed words, in seconds.
    pace: float = 0.02

    @property
    def _llm_type(self) -> str:
        return "deterministic"

    def bind_tools(self, tools: Any, **kwargs: Any) -> DeterministicModel:
        return self

    def _answer(self, messages: list[BaseMessage]) -> AIMessage:
        last = messages[-1]
        if isinstance(last, ToolMessage):
            return AIMessage(f"The result is {last.content}.")
        text = str(last.content)
        if found := _SUM.search(text):
            left, operator, right = found.groups()
            call = {
                "name": "calculate",
                "args": {"left": int(left), "operator": operator, "right": int(right)},
                "id": f"call_{len(messages)}",
            }
            return AIMessage("", tool_calls=[call])
        return AIMessage(f"You said: {text}")

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return ChatResult(generations=[ChatGeneration(message=self._answer(messages))])

    def _chunks(self, messages: list[BaseMessage]) -> Iterator[ChatGenerationChunk]:
        answer = self._answer(messages)
        if answer.tool_calls:
            call = answer.tool_calls[0]
            args = str(call["args"]).replace("'", '"')
            piece = ToolCallChunk(name=call["name"], args=args, id=call["id"], index=0)
            yield ChatGenerationChunk(message=AIMessageChunk(content="", tool_call_chunks=[piece]))
            return
        for word in re.findall(r"\S+\s*", str(answer.content)):
            yield ChatGenerationChunk(message=AIMessageChunk(content=word))

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        for chunk in self._chunks(messages):
            if run_manager:
                run_manager.on_llm_new_token(chunk.text, chunk=chunk)
            yield chunk
            time.sleep(self.pace)

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        for chunk in self._chunks(messages):
            if run_manager:
                await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
            yield chunk
            await asyncio.sleep(self.pace)
