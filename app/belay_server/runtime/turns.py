"""Let the requests of a web process be worked on in turns.

A request that takes long does its work in parts, and lets the event loop serve the other sockets
between them.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

#: In seconds. Any time above zero waits for the next iteration of gevent's event loop.
_MOMENT = 1e-6
#: Held by the caller of `wait_for_turn` that passes next.
_NEXT = threading.Lock()


def yield_to_sockets() -> None:
    """Wait until the event loop has polled all sockets.

    Under gevent, `sleep(0)` does less: it lets other ready greenlets run, fifty of them before the
    loop polls the sockets. Without gevent this lets other threads run.
    """
    time.sleep(_MOMENT)


def wait_for_turn() -> None:
    """Wait until all earlier callers of this function have passed, and the event loop has then
    polled all sockets.

    Call this before a part of long work if clients can cause many such parts at once, one on each
    connection. Each part is then done in another iteration of the event loop, and a request of
    another client waits for one part, not for all.
    """
    with _NEXT:
        yield_to_sockets()


class Turns:
    """Serializes the parts of one kind of work, fairly between callers: of streams, for instance.

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
        """Wait until no other part is being worked on and the event loop has polled all sockets."""
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
