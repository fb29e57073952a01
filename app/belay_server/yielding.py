"""Let a web process serve its other sockets between two parts of long work."""

from __future__ import annotations

import threading
import time

#: In seconds. Any time above zero waits for the next iteration of gevent's event loop.
_MOMENT = 1e-6
#: Held by the one caller of `wait_for_turn` that passes next.
_NEXT = threading.Lock()


def yield_to_sockets() -> None:
    """Wait until the event loop has polled all sockets.

    Under gevent, `sleep(0)` does less: it lets other ready greenlets run, fifty of them before the
    loop polls the sockets. Without gevent this lets other threads run.
    """
    time.sleep(_MOMENT)


def wait_for_turn() -> None:
    """Wait until no other caller of this function is next and the event loop has polled all
    sockets.

    For parts of work of which clients can cause many at once: of each connection one. The parts are
    then done in different iterations of the event loop, so that a request of another client waits
    for one of them, and not for all.
    """
    with _NEXT:
        yield_to_sockets()
