"""The two ends of the connection between a worker's parent process and one of its children.

They are a pair of sockets. The child sends its process id at its start, and then one byte whenever
it can take a run; the parent sends the ids of runs. When the parent closes its end, an idle child
exits.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast
from uuid import UUID

#: The child can take a run. The second also says that earlier runs have left work in it.
_READY = b"+"
_READY_WITH_WORK = b"*"
_ID_BYTES = 16
_PID = struct.Struct("=q")


@dataclass(frozen=True, slots=True)
class Message:
    """A received doorbell. `accepted` acknowledges it; `done` removes it from Celery's active
    requests. `is_second`: the child that it was given to has died, perhaps before it claimed the
    run."""

    run_id: UUID
    accepted: Callable[[int], None]
    done: Callable[[], None]
    is_second: bool = False


class ChildProcess:
    """The parent's end. No method blocks."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._connection = connection
        self.started_at = time.monotonic()
        #: The process id, once the child has sent it.
        self.pid: int | None = None
        self.was_ready = False
        self.is_idle = False
        self.idle_since = 0.0
        #: Whether earlier runs have left threads, tasks or processes that are to go on.
        self.has_work = False
        #: The message whose run the child executes.
        self.message: Message | None = None

    def fileno(self) -> int:
        """Return the connection's descriptor, -1 once it is closed."""
        return self._connection.fileno()

    @property
    def is_starting(self) -> bool:
        return not self.was_ready and self.fileno() != -1

    def give(self, message: Message) -> bool:
        """Send the run of a message to an idle child. Return False if the child has ended."""
        try:
            self._connection.sendall(message.run_id.bytes)
        except OSError:
            return False
        self.is_idle = False
        self.message = message
        return True

    def receive(self) -> bool:
        """Read what the child has sent. Return False if it has ended."""
        try:
            if self.pid is None and (sent := self._connection.recv(_PID.size)):
                self.pid = cast("int", _PID.unpack(sent)[0])
                return True
            sent = self._connection.recv(1)
        except BlockingIOError:
            return True
        except OSError:
            return False
        if not sent:
            return False
        self.was_ready = True
        self.is_idle = True
        self.idle_since = time.monotonic()
        self.has_work = sent == _READY_WITH_WORK
        self.done()
        return True

    def done(self) -> None:
        """Report the end of the run that the child was given, if there is one."""
        message, self.message = self.message, None
        if message is not None:
            message.done()

    def close(self) -> None:
        self.is_idle = False
        self._connection.close()


class RunSource:
    """The child's end: receives the ids of the runs to execute."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._connection.sendall(_PID.pack(os.getpid()))

    def next_run(self, *, has_work: bool) -> UUID | None:
        """Wait for the next run. Return None when there is none: this child is to end, or its
        parent has died. `has_work`: earlier runs have left work in this child."""
        try:
            self._connection.sendall(_READY_WITH_WORK if has_work else _READY)
            received = self._connection.recv(_ID_BYTES, socket.MSG_WAITALL)
        except OSError:
            return None
        return UUID(bytes=received) if len(received) == _ID_BYTES else None
