"""A small client of the Debug Adapter Protocol, as editors have one."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self


class Debugger:
    """A debugger that is attached to the adapter at a port of this machine."""

    def __init__(self, port: int, *, seconds: float = 60.0) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=seconds)
        self._stream = self._socket.makefile("rb")
        self._seq = 0
        self._unread: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _: TracebackType | None,
    ) -> None:
        self._stream.close()
        self._socket.close()

    def attach(self, file: Path, line: int) -> None:
        """Attach, with a breakpoint at a line."""
        self.request("initialize", adapterID="python", pathFormat="path")
        attached = self._send("attach", justMyCode=True)
        self.wait_for_event("initialized")
        source = {"path": str(file)}
        self.request("setBreakpoints", source=source, breakpoints=[{"line": line}])
        self.request("configurationDone")
        self._response_to(attached)

    def request(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Send a request and return the body of its response."""
        return self._response_to(self._send(command, **arguments))

    def wait_for_event(self, name: str) -> dict[str, Any]:
        """Return the body of the next event of this name."""
        found = self._find(lambda m: m["type"] == "event" and m["event"] == name)
        body: dict[str, Any] = found.get("body") or {}
        return body

    def _send(self, command: str, **arguments: Any) -> int:
        self._seq += 1
        message = {"seq": self._seq, "type": "request", "command": command, "arguments": arguments}
        data = json.dumps(message).encode()
        self._socket.sendall(b"Content-Length: %d\r\n\r\n%b" % (len(data), data))
        return self._seq

    def _response_to(self, seq: int) -> dict[str, Any]:
        found = self._find(lambda m: m["type"] == "response" and m["request_seq"] == seq)
        assert found["success"], found
        body: dict[str, Any] = found.get("body") or {}
        return body

    def _find(self, is_wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        while not (found := [message for message in self._unread if is_wanted(message)]):
            self._unread.append(self._receive())
        self._unread.remove(found[0])
        return found[0]

    def _receive(self) -> dict[str, Any]:
        length = 0
        while (line := self._stream.readline()) not in (b"\r\n", b""):
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
        assert length, "the adapter has closed the connection"
        message: dict[str, Any] = json.loads(self._stream.read(length))
        return message
