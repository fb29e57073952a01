"""A child process as its worker's parent sees it: it is given runs, and says when it can take one.

Parent and child share a pair of sockets. The child sends its process id when it is ready, and
`READY` after each run; the parent sends the ids of runs. A closed connection ends an idle child.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Callable
from typing import cast
from uuid import UUID

_READY = b"+"
_ID_BYTES = 16
_PID = struct.Struct("=q")


class ChildProcess:
    """The parent's end. Nothing blocks."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._connection = connection
        #: None until the child is ready for its first run.
        self.pid: int | None = None
        self.is_idle = False
        self.idle_since = 0.0
        self._on_done: Callable[[], None] | None = None

    def fileno(self) -> int:
        """Return the connection's descriptor, -1 once it is closed."""
        return self._connection.fileno()

    @property
    def is_starting(self) -> bool:
        return self.pid is None and self.fileno() != -1

    def give(self, run_id: UUID, on_done: Callable[[], None]) -> bool:
        """Give an idle child a run; `on_done` is called when it can take another. Return False if
        the child has ended."""
        try:
            self._connection.sendall(run_id.bytes)
        except OSError:
            return False
        self.is_idle = False
        self._on_done = on_done
        return True

    def receive(self) -> bool:
        """Read what the child has sent. Return False if it has ended."""
        try:
            said = self._connection.recv(_PID.size)
        except BlockingIOError:
            return True
        except OSError:
            return False
        if not said:
            return False
        if self.pid is None:
            self.pid = cast("int", _PID.unpack(said)[0])
        self.is_idle = True
        self.idle_since = time.monotonic()
        self.done()
        return True

    def done(self) -> None:
        """Report that the run which the child was given, if any, is over."""
        on_done, self._on_done = self._on_done, None
        if on_done is not None:
            on_done()

    def close(self) -> None:
        self.is_idle = False
        self._connection.close()


class Employer:
    """The child's end: where its runs come from."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._has_said_hello = False

    def next_run(self) -> UUID | None:
        """Say that this child can take a run, and wait for its id. Return None when there will be
        none: this child is to end, or its parent has died."""
        hello = _READY if self._has_said_hello else _PID.pack(os.getpid())
        self._has_said_hello = True
        try:
            self._connection.sendall(hello)
            said = self._connection.recv(_ID_BYTES, socket.MSG_WAITALL)
        except OSError:
            return None
        return UUID(bytes=said) if len(said) == _ID_BYTES else None
