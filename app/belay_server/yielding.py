"""Let a web process serve its other sockets between two parts of long work."""

from __future__ import annotations

import time

#: In seconds. Any time above zero waits for the next iteration of gevent's event loop.
_MOMENT = 1e-6


def yield_to_sockets() -> None:
    """Wait until the event loop has looked at all sockets.

    Under gevent, `sleep(0)` does less: it only lets the other greenlets run that are ready, fifty
    of them before the loop looks at the sockets. In other processes this is a switch of threads.
    """
    time.sleep(_MOMENT)
