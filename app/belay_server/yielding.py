"""Let a web process serve its other sockets between two parts of long work."""

from __future__ import annotations

import time

#: In seconds. Any time above zero waits for the next iteration of gevent's event loop.
_MOMENT = 1e-6


def yield_to_sockets() -> None:
    """Wait until the event loop has polled all sockets.

    Under gevent, `sleep(0)` does less: it lets other ready greenlets run, fifty of them before the
    loop polls the sockets. Without gevent this lets other threads run.
    """
    time.sleep(_MOMENT)
