"""Chat messages in version 2 of the streaming protocol: a start, blocks of content that grow, and a
finish, made from the chunks that a run has streamed.

LangChain's own bridge makes the events. It pulls chunks from an iterator, but here they arrive one
by one. So it is run step by step as a coroutine, which pauses until the next chunk has arrived.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Generator, Mapping
from typing import Any

from langchain_core.language_models._compat_bridge import achunks_to_events, message_to_events
from langchain_core.messages import AIMessageChunk, BaseMessage, convert_to_messages
from langchain_core.outputs import ChatGenerationChunk

_ROLES = {"ai": "ai", "human": "human", "system": "system"}
_CHUNK = "AIMessageChunk"


class _Pause:
    """Awaited while the next chunk has not arrived."""

    def __await__(self) -> Generator[None, None, None]:
        yield


class _GrowingMessage:
    """One message whose chunks are still arriving."""

    def __init__(self, message_id: str | None) -> None:
        self._chunks: deque[AIMessageChunk] = deque()
        self._over = False
        self._events = achunks_to_events(self._next_chunks(), message_id=message_id)
        self._step: Any = None

    async def _next_chunks(self) -> AsyncIterator[ChatGenerationChunk]:
        while True:
            while self._chunks:
                yield ChatGenerationChunk(message=self._chunks.popleft())
            if self._over:
                return
            await _Pause()

    def take(self, chunk: AIMessageChunk) -> list[dict[str, Any]]:
        self._chunks.append(chunk)
        return self._events_until_pause()

    def finish(self) -> list[dict[str, Any]]:
        self._over = True
        return self._events_until_pause()

    def _events_until_pause(self) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = []
        while True:
            step: Any = self._step if self._step is not None else anext(self._events)
            try:
                step.send(None)
            except StopIteration as event:
                self._step = None
                events.append(event.value)
            except StopAsyncIteration:
                return events
            else:
                self._step = step
                return events


class MessageEvents:
    """The messages of one namespace of one run."""

    def __init__(self) -> None:
        self._growing: dict[str, _GrowingMessage] = {}

    def take(self, message: Mapping[str, Any], metadata: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the events of a chunk or a whole message. `message` is a JSON object.

        A tool message has none: its tool call has its own events.
        """
        if message.get("type") == "tool":
            return []
        message_id = message.get("id")
        if message.get("type") != _CHUNK:
            whole = convert_to_messages([dict(message)])[0]
            events = [dict(event) for event in message_to_events(whole, message_id=message_id)]
            return _described(events, message_id, _role(whole), metadata)
        key = message_id or ""
        growing = self._growing.setdefault(key, _GrowingMessage(message_id))
        events = growing.take(_as_chunk(message))
        if message.get("chunk_position") == "last":
            events += self._growing.pop(key).finish()
        return _described(events, message_id, "ai", metadata)

    def finish(self) -> list[dict[str, Any]]:
        """Return the last events of the messages, because their step has ended."""
        events = []
        for message_id, growing in self._growing.items():
            events += _described(growing.finish(), message_id or None, "ai", {})
        self._growing.clear()
        return events


def _as_chunk(message: Mapping[str, Any]) -> AIMessageChunk:
    """Return the chunk of a JSON object. LangChain derives its tool calls from their chunks."""
    given = {k: v for k, v in message.items() if k not in ("tool_calls", "invalid_tool_calls")}
    return AIMessageChunk(**given)


def _role(message: BaseMessage) -> str:
    return _ROLES.get(message.type, "ai")


def _described(
    events: list[dict[str, Any]], message_id: str | None, role: str, metadata: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Add the message's id to every event, which distinguishes messages that grow at the same time,
    and the role and the node to its start. Return the events."""
    for event in events:
        if message_id:
            event["message_id"] = message_id
        if event["event"] == "message-start":
            event["role"] = role
            if node := metadata.get("langgraph_node"):
                event["metadata"] = {**event.get("metadata", {}), "langgraph_node": node}
    return events
