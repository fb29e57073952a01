"""A stand-in for a language model: the HTTP APIs of OpenAI and Anthropic, streaming, on loopback.

It obeys the last message of a request: `call TOOL {json}` calls a tool, `say N` streams N words,
and a tool's result is repeated, but after `repeat TOOL {json}` the tool is called again and again.
Anything else is answered by `ok`. It notes when a client closes a
connection before the end, which is how a cancelled call of a model ends. `GET /calls` returns the
calls as JSON.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from select import select
from socket import MSG_PEEK
from typing import Any, TypedDict

from tests.waiting import wait_until


@dataclass(slots=True)
class ModelCall:
    """One call of the model. `words` counts what was made, and sent if it streams."""

    last_message: str
    words: int = 0
    has_ended: bool = False
    was_closed_early: bool = False


@dataclass(frozen=True, slots=True)
class Reply:
    """What the model answers: a text, or the call of a tool."""

    text: str = ""
    tool: str | None = None
    arguments: str = "{}"


class Variables(TypedDict):
    """The variables with which the libraries of both makers call a server."""

    OPENAI_BASE_URL: str
    OPENAI_API_KEY: str
    ANTHROPIC_BASE_URL: str
    ANTHROPIC_API_KEY: str


class ModelServer:
    """Serves both APIs. `calls` has every call so far."""

    def __init__(self, *, seconds_per_word: float = 0.02) -> None:
        self.calls: list[ModelCall] = []
        self.seconds_per_word = seconds_per_word
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def environ(self) -> Variables:
        return {
            "OPENAI_BASE_URL": f"{self.url}/v1",
            "OPENAI_API_KEY": "none",
            "ANTHROPIC_BASE_URL": self.url,
            "ANTHROPIC_API_KEY": "none",
        }

    def calls_with(self, text: str) -> list[ModelCall]:
        """Return the calls whose last message is this text."""
        return [call for call in self.calls if call.last_message.strip() == text]

    def wait_for_words(self, text: str) -> ModelCall:
        """Wait until the model answers this text. Return the call."""
        wait_until(lambda: any(call.words for call in self.calls_with(text)), 60, text)
        return self.calls_with(text)[-1]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def model_server() -> Iterator[ModelServer]:
    server = ModelServer()
    try:
        yield server
    finally:
        server.close()


def reply_to(messages: list[dict[str, Any]]) -> tuple[str, Reply]:
    """Return the text of the last message and the answer to it."""
    last = messages[-1]
    content = last.get("content")
    is_result = last["role"] == "tool" or _is_tool_result(content)
    if isinstance(content, list) and not is_result:
        content = content[-1:]  # clients of Anthropic put messages of one role together
    text = _text_of(content)
    if is_result:
        repeated = next(
            (m for m in messages if _text_of(m.get("content")).startswith("repeat ")), None
        )
        if repeated is not None:
            return text, _call(_text_of(repeated["content"]).strip().partition(" ")[2])
        return text, Reply(f"result: {text}")
    command, _, rest = text.strip().partition(" ")
    if command in ("call", "repeat"):
        return text, _call(rest)
    if command == "say":
        return text, Reply(" ".join(f"word{number}" for number in range(int(rest))))
    return text, Reply("ok")


def _call(words: str) -> Reply:
    tool, _, arguments = words.partition(" ")
    return Reply(tool=tool, arguments=arguments or "{}")


def _text_of(content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = [part if isinstance(part, dict) else {"text": part} for part in content or []]
    return "".join(str(part.get("text") or _text_of(part.get("content"))) for part in parts)


def _is_tool_result(content: Any) -> bool:
    return isinstance(content, list) and any(
        isinstance(part, dict) and part.get("type") == "tool_result" for part in content
    )


def _handler(server: ModelServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != "/calls":
                self.send_error(404)
                return
            self._send_json([asdict(call) for call in server.calls])

        def do_POST(self) -> None:
            length = int(self.headers["content-length"])
            data = self.rfile.read(length)
            if len(data) < length:
                return  # the client has closed the connection within its request
            body = json.loads(data)
            if not self.path.endswith(("/chat/completions", "/messages")):
                self.send_error(404)
                return
            text, reply = reply_to(body["messages"])
            call = ModelCall(text)
            server.calls.append(call)
            of_anthropic = self.path.endswith("/messages")
            if not body.get("stream"):
                self._think(reply, call)
                make = _anthropic_message if of_anthropic else _openai_completion
                if not call.was_closed_early:
                    self._send_json(make(reply))
                call.has_ended = True
                return
            events = _anthropic_events(reply) if of_anthropic else _openai_events(reply)
            self._stream(events, call)

        def _think(self, reply: Reply, call: ModelCall) -> None:
            """Take as long as a stream would, or until the client closes the connection."""
            for _ in _words(reply.text):
                call.words += 1
                readable, _, _ = select([self.connection], [], [], server.seconds_per_word)
                if readable and not self.connection.recv(1, MSG_PEEK):
                    call.was_closed_early = True
                    return

        def _send_json(self, document: Any) -> None:
            data = json.dumps(document).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def _stream(self, events: Iterator[str], call: ModelCall) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.send_header("connection", "close")
            self.end_headers()
            self.close_connection = True
            try:
                for event in events:
                    self.wfile.write(event.encode())
                    self.wfile.flush()
                    call.words += 1
                    time.sleep(server.seconds_per_word)
            except (BrokenPipeError, ConnectionResetError):
                call.was_closed_early = True
            call.has_ended = True

        def log_message(self, *_: object) -> None: ...

    return Handler


def _words(text: str) -> list[str]:
    return [f"{word} " for word in text.split(" ")]


def _openai_events(reply: Reply) -> Iterator[str]:
    def chunk(delta: dict[str, Any], reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        shared = {"id": "chatcmpl-1", "created": 0, "model": "stand-in"}
        document = {**shared, "object": "chat.completion.chunk", "choices": [choice]}
        return f"data: {json.dumps(document)}\n\n"

    if reply.tool is not None:
        function = {"name": reply.tool, "arguments": reply.arguments}
        call = {"index": 0, "id": "call_1", "type": "function", "function": function}
        yield chunk({"role": "assistant", "content": None, "tool_calls": [call]})
        yield chunk({}, "tool_calls")
    else:
        for word in _words(reply.text):
            yield chunk({"role": "assistant", "content": word})
        yield chunk({}, "stop")
    yield "data: [DONE]\n\n"


def _openai_completion(reply: Reply) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": reply.text}
    if reply.tool is not None:
        function = {"name": reply.tool, "arguments": reply.arguments}
        message["tool_calls"] = [{"id": "call_1", "type": "function", "function": function}]
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 0,
        "model": "stand-in",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
    }


_USAGE = {"input_tokens": 1, "output_tokens": 1}


def _anthropic_blocks(reply: Reply) -> list[dict[str, Any]]:
    if reply.tool is None:
        return [{"type": "text", "text": reply.text}]
    arguments = json.loads(reply.arguments)
    return [{"type": "tool_use", "id": "toolu_1", "name": reply.tool, "input": arguments}]


def _anthropic_message(reply: Reply) -> dict[str, Any]:
    return {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "stand-in",
        "content": _anthropic_blocks(reply),
        "stop_reason": "end_turn" if reply.tool is None else "tool_use",
        "stop_sequence": None,
        "usage": _USAGE,
    }


def _anthropic_events(reply: Reply) -> Iterator[str]:
    def event(kind: str, **fields: Any) -> str:
        return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n"

    message = {**_anthropic_message(reply), "content": [], "stop_reason": None}
    yield event("message_start", message=message)
    (block,) = _anthropic_blocks(reply)
    if reply.tool is None:
        yield event("content_block_start", index=0, content_block={"type": "text", "text": ""})
        for word in _words(reply.text):
            delta = {"type": "text_delta", "text": word}
            yield event("content_block_delta", index=0, delta=delta)
    else:
        yield event("content_block_start", index=0, content_block={**block, "input": {}})
        delta = {"type": "input_json_delta", "partial_json": reply.arguments}
        yield event("content_block_delta", index=0, delta=delta)
    yield event("content_block_stop", index=0)
    reason = "end_turn" if reply.tool is None else "tool_use"
    end = {"stop_reason": reason, "stop_sequence": None}
    yield event("message_delta", delta=end, usage=_USAGE)
    yield event("message_stop")
