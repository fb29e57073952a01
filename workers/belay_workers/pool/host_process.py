"""The two ends of the connection between a worker's parent process and one of its hosts.

The parent sends the ids of runs, 16 bytes each. The host sends messages of 17 bytes: a kind, and
the id of the run that they are about. When the parent closes its end, the host exits once its runs
have ended.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from uuid import UUID

from belay_workers.pool.child_process import Message

_READY = b"+"
_ENDED = b"e"
_NOT_CLAIMED = b"n"
_WORN = b"w"
_ID_BYTES = 16
_BYTES = 1 + _ID_BYTES
_READ = 65_536


class HostProcess:
    """The parent's end. No method blocks."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._connection = connection
        self._received = b""
        self.started_at = time.monotonic()
        #: The process id, once the host has sent it.
        self.pid: int | None = None
        #: Whether it is to be replaced when its runs have ended: it has frozen one.
        self.is_worn = False
        #: Whether a signal has stopped it.
        self.is_stopped = False
        #: The messages of the runs that it has. There may be several of one run.
        self._messages: dict[UUID, list[Message]] = {}
        #: How many messages it has.
        self.load = 0
        self._declined: list[Message] = []

    def fileno(self) -> int:
        """Return the connection's descriptor, -1 once it is closed."""
        return self._connection.fileno()

    @property
    def is_starting(self) -> bool:
        return self.pid is None and self.fileno() != -1

    @property
    def takes_runs(self) -> bool:
        """Whether it can be given further runs."""
        is_able = not (self.is_worn or self.is_stopped)
        return self.pid is not None and is_able and self.fileno() != -1

    def take_declined(self) -> list[Message]:
        """Return the messages whose runs it could not claim, and forget them."""
        declined, self._declined = self._declined, []
        return declined

    def give(self, message: Message) -> bool:
        """Send the run of a message. Return False if the host has ended or does not read."""
        try:
            sent = self._connection.send(message.run_id.bytes)
        except OSError:
            return False
        if sent != _ID_BYTES:  # the half of an id: it cannot be told from the next
            self.close()
            return False
        self._messages.setdefault(message.run_id, []).append(message)
        self.load += 1
        return True

    def outstanding(self) -> list[Message]:
        """Return the messages that it has."""
        return [message for of_run in self._messages.values() for message in of_run]

    def receive(self) -> bool:
        """Read what the host has sent. Return False if it has ended."""
        try:
            data = self._connection.recv(_READ)
        except BlockingIOError:
            return True
        except OSError:
            return False
        if not data:
            return False
        self._received += data
        whole = len(self._received) - len(self._received) % _BYTES
        for at in range(0, whole, _BYTES):
            self._take(self._received[at : at + 1], self._received[at + 1 : at + _BYTES])
        self._received = self._received[whole:]
        return True

    def _take(self, kind: bytes, of: bytes) -> None:
        if kind == _READY:
            self.pid = int.from_bytes(of)
        elif kind == _WORN:
            self.is_worn = True
        else:
            self._end_attempt(UUID(bytes=of), was_claimed=kind == _ENDED)

    def _end_attempt(self, run_id: UUID, *, was_claimed: bool) -> None:
        of_run = self._messages[run_id]
        message = of_run.pop()
        if not of_run:
            del self._messages[run_id]
        self.load -= 1
        if was_claimed:
            message.done()
        else:
            self._declined.append(message)

    def close(self) -> None:
        self._connection.close()


class RunStream:
    """The host's end."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._received = b""
        self.is_closed = False

    def fileno(self) -> int:
        return self._connection.fileno()

    def receive(self) -> Iterator[UUID]:
        """Yield the ids of the runs that have been sent. Sets `is_closed` when there are no
        more."""
        try:
            data = self._connection.recv(_READ, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self.is_closed = not data
        self._received += data
        while len(self._received) >= _ID_BYTES:
            yield UUID(bytes=self._received[:_ID_BYTES])
            self._received = self._received[_ID_BYTES:]

    def report_ready(self) -> None:
        """Report that the host has started."""
        self._send(_READY, os.getpid().to_bytes(_ID_BYTES))

    def report_end(self, run_id: UUID, *, was_claimed: bool) -> None:
        """Report the end of an attempt, or that the run could not be claimed here."""
        self._send(_ENDED if was_claimed else _NOT_CLAIMED, run_id.bytes)

    def report_worn(self) -> None:
        """Report that the host is to be replaced when its runs have ended."""
        self._send(_WORN, bytes(_ID_BYTES))

    def _send(self, kind: bytes, of: bytes) -> None:
        try:
            self._connection.sendall(kind + of)
        except OSError:
            self.is_closed = True
