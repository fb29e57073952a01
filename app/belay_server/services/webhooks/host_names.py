"""Resolve host names, with a time limit and a limit on concurrent look-ups.

A client chooses the name, and its name server may be slow. The system's resolver cannot be
interrupted, and under gevent all look-ups of a process share ten threads, which also resolve the
names of Postgres and Redis. So look-ups are limited, and one caller may use half of the limit.
"""

from __future__ import annotations

import ipaddress
import queue
import socket
import threading

from belay_server.domain.webhooks import Address
from belay_server.runtime.shares import Shares


class HostNames:
    """The resolver of one process. Each look-up has a thread, which ends with it."""

    def __init__(self, *, at_once: int = 6, seconds: float = 5.0) -> None:
        self._places = Shares(at_once)
        self._seconds = seconds

    def look_up(self, host: str, port: int, *, caller: str | None = None) -> list[Address]:
        """Return the addresses of a host name, or of a numeric address in any notation.

        Raises OSError, and its subclass TimeoutError.
        """
        try:
            return _addresses(host, port, socket.AI_NUMERICHOST)
        except OSError:
            pass  # a name
        if not self._places.hold(caller, 1, seconds=self._seconds):
            raise TimeoutError(f"cannot look up '{host}': too many look-ups at once")
        found: queue.SimpleQueue[list[Address] | OSError] = queue.SimpleQueue()

        def look_up() -> None:
            try:
                found.put(_addresses(host, port, 0))
            except OSError as error:
                found.put(error)
            finally:
                self._places.release(caller, 1)

        threading.Thread(target=look_up, name="belay-look-up", daemon=True).start()
        try:
            answer = found.get(timeout=self._seconds)
        except queue.Empty:
            raise TimeoutError(f"cannot look up '{host}' within {self._seconds:.0f} s") from None
        if isinstance(answer, OSError):
            raise answer
        return answer


def _addresses(host: str, port: int, flags: int) -> list[Address]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    except UnicodeError as error:
        raise OSError(f"'{host}' is not a host name") from error
    return [ipaddress.ip_address(str(entry[4][0]).split("%")[0]) for entry in found]
