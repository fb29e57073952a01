"""Let the streams of a web process work in turns."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from flask import current_app

from belay_server.yielding import yield_to_sockets

STREAM_TURNS = "belay.stream_turns"


class StreamTurns:
    """Serializes the work of a web process's streams, one part at a time, fairly between callers.

    A stream that replays a long log always has work to do, and an event of a run with hundreds of
    clients is work for all of them at once. Without turns, each stream would do a part in every
    iteration of the event loop, and a new request takes several iterations. The callers go one
    after the other, each with one stream, so that a caller with many streams delays its own.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_taken = False
        #: A closed gate for each waiting stream. The caller whose turn is next is the first.
        self._waiting: dict[str | None, deque[threading.Lock]] = {}

    @contextmanager
    def turn(self, caller: str | None) -> Iterator[None]:
        """Wait until no other stream is working and the event loop has polled all sockets."""
        gate = self._take_or_queue(caller)
        if gate is not None:
            self._wait(gate, caller)
        try:
            yield_to_sockets()
            yield
        finally:
            self._pass_on()

    def _take_or_queue(self, caller: str | None) -> threading.Lock | None:
        """Take the turn and return None, or return the gate to wait for."""
        with self._lock:
            if not self._is_taken:
                self._is_taken = True
                return None
            gate = threading.Lock()
            gate.acquire()
            self._waiting.setdefault(caller, deque()).append(gate)
            return gate

    def _wait(self, gate: threading.Lock, caller: str | None) -> None:
        """Wait for the stream that opens the gate when it passes its turn on. If the wait is
        interrupted, leave the queue, or pass on the turn that came at the same time."""
        try:
            gate.acquire()
        except BaseException:
            with self._lock:
                gates = self._waiting.get(caller, deque())
                is_waiting = gate in gates
                if is_waiting:
                    gates.remove(gate)
                    if not gates:
                        del self._waiting[caller]
            if not is_waiting:
                self._pass_on()
            raise

    def _pass_on(self) -> None:
        with self._lock:
            caller = next(iter(self._waiting), None)
            gates = self._waiting.pop(caller, None)
            if gates is None:
                self._is_taken = False
                return
            gate = gates.popleft()
            if gates:
                self._waiting[caller] = gates
        gate.release()


def stream_turns() -> StreamTurns:
    """Return the StreamTurns of this web process."""
    found: StreamTurns = current_app.extensions[STREAM_TURNS]
    return found
