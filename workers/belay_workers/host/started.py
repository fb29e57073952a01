"""Find the processes and threads that the runs of a host have started.

Threads are noted when they are started: `Thread.start` and `_thread.start_new_thread` are replaced
in this process. Python announces a process before it exists (an audit event), in the context of
what starts it; those that are new after that step of the run, or after that call on a thread, are
the run's. Two runs whose calls on threads start processes at the same moment are not told apart.
"""

from __future__ import annotations

import _thread
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import thread as pool_threads
from functools import partial, wraps
from typing import Any

import psutil

from belay_workers.host.gates import GatedRun
from belay_workers.host.threads import is_of_anyio
from belay_workers.supervision import processes

_EVENTS = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system"}


class Started:
    """What runs have started. Make it once in a host."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._processes = set(processes.descendants(os.getpid()))
        sys.addaudithook(_note_process)
        threading.Thread.start = _noting_thread(threading.Thread.start)  # type: ignore[assignment,method-assign]
        _thread.start_new_thread = _noting_ident(_thread.start_new_thread)

    def attribute(self, run: GatedRun) -> None:
        """Attribute new processes to the run. Call it when `run.has_started` is true."""
        with self._lock:
            run.has_started = False
            found = set(processes.descendants(os.getpid())) - self._processes
            run.processes |= found
            self._processes |= found

    def end(self, run: GatedRun) -> bool:
        """Kill the processes that a stopped run has started. Return whether one of them, or a
        thread that it has started, is left."""
        if run.has_started:
            self.attribute(run)
        if run.processes:
            # Also what they have started and left, which is this process's child now.
            with self._lock:
                left = set(processes.descendants(os.getpid())) - self._processes
            for process in run.processes | left:
                processes.kill_with_descendants(process)
            _ended, alive = psutil.wait_procs([*run.processes, *left], timeout=0)
            run.processes = set(alive)
        return bool(run.processes) or _has_threads(run)

    def forget(self, run: GatedRun) -> None:
        """Forget the processes of a run that has ended."""
        with self._lock:
            self._processes = {process for process in self._processes if process.is_running()}
            run.processes.clear()


def _has_threads(run: GatedRun) -> bool:
    if any(thread.is_alive() for thread in run.threads):
        return True
    return bool(run.idents) and not run.idents.isdisjoint(sys._current_frames())


def _note_process(event: str, _args: tuple[Any, ...]) -> None:
    if event in _EVENTS and (run := GatedRun.current()) is not None:
        run.has_started = True


def _noting_thread(start: Callable[[threading.Thread], None]) -> Callable[[threading.Thread], None]:
    """Note the threads of runs. Those of a pool are known by their calls (`RunThreads`)."""

    @wraps(start)
    def noting(thread: threading.Thread) -> None:
        run = GatedRun.current()
        is_of_pool = getattr(thread, "_target", None) is pool_threads._worker
        if run is not None and not is_of_pool and not is_of_anyio(thread):
            run.threads.add(thread)
            thread.run = partial(run.call, thread.run)  # type: ignore[method-assign]
        start(thread)

    return noting


def _noting_ident(start: Callable[..., int]) -> Callable[..., int]:
    @wraps(start)
    def noting(function: Any, *args: Any) -> int:
        run = GatedRun.current()
        if run is None:
            return start(function, *args)
        ident = start(partial(run.call, function), *args)
        run.idents.add(ident)
        return ident

    return noting
