"""The cost of a server under load: CPU and memory of all of its processes.

The CPU time of processes that have ended meanwhile is in their parent's account of its children, so
a server that replaces its workers is charged for them. Memory is proportional (PSS): memory shared
by forked processes is counted once.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

import psutil


def listener(url: str) -> int:
    """Return the process that listens on this URL's port; the oldest, if several do."""
    port = urlsplit(url).port
    pids = {
        connection.pid
        for connection in psutil.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
        and connection.laddr
        and connection.laddr.port == port
    }
    found = [psutil.Process(pid) for pid in pids if pid is not None]
    if not found:
        raise SystemExit(f"nothing on this machine listens on {url}; give its process id")
    return min(found, key=lambda process: process.create_time()).pid


@dataclass(frozen=True)
class ProcessTree:
    """A server: its root process and all descendants."""

    root: int

    def processes(self) -> list[psutil.Process]:
        parent = psutil.Process(self.root)
        return [parent, *parent.children(recursive=True)]

    def cpu_seconds(self) -> float:
        """Return the CPU time of all processes, including those that have ended."""
        total = 0.0
        for process in self.processes():
            with suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system + times.children_user + times.children_system
        return total

    def memory(self) -> int:
        """Return the bytes in use; shared memory is counted once."""
        total = 0
        for process in self.processes():
            with suppress(psutil.Error):
                total += process.memory_full_info().pss
        return total


class MemoryPeak:
    """Records the peak memory of a process tree within a block, sampled every second."""

    def __init__(self, tree: ProcessTree) -> None:
        self._tree = tree
        self._done = threading.Event()
        self.bytes = 0

    def __enter__(self) -> MemoryPeak:
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(1.0):
            self.bytes = max(self.bytes, self._tree.memory())
