"""Ports for servers that tests stop and start again.

They are outside the range from which the kernel takes the ports of clients, and each process of the
tests has its own: while a server is down, nothing else can take its port.
"""

from __future__ import annotations

import itertools
import os
import random
import socket
from contextlib import suppress

_FIRST, _EACH, _PROCESSES = 10_000, 2_500, 8


def _ports() -> itertools.cycle[int]:
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % _PROCESSES
    ports = list(range(_FIRST + worker * _EACH, _FIRST + (worker + 1) * _EACH))
    random.shuffle(ports)
    return itertools.cycle(ports)


_next = _ports()


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that nothing uses now."""
    for port in _next:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("there is no port")


def accepts(port: int) -> bool:
    """Return whether a server accepts connections on a port of this machine."""
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False
