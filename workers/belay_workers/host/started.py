"""Find the processes and threads that the runs of a host have started.

The functions that start them are replaced in this process, so each is noted as its run's before
anything else of the host is executed. What is executed as a program gets the run's id in its
environment, and hands it on: so what such a program starts and leaves is found, too.

Processes that native code starts are not known as a run's.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import thread as pool_threads
from contextlib import suppress
from contextvars import Context
from functools import partial, wraps
from multiprocessing.forkserver import ForkServer
from multiprocessing.process import BaseProcess
from multiprocessing.resource_tracker import ResourceTracker
from pathlib import Path
from typing import Any

import psutil

from belay_workers.host.gated_run import GatedRun, uninterrupted
from belay_workers.host.replaceable_functions import make_replaceable
from belay_workers.host.threads import is_of_anyio
from belay_workers.supervision import processes

#: The variable in the environment of the programs that a run starts.
MARK = "BELAY_STARTED_BY_RUN"
#: The place of the environment among the arguments of `_posixsubprocess.fork_exec`.
_ENV = 5


class Started:
    """What runs have started. Make it once in a host."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        #: The processes that are known: the host's own, and those of its runs.
        self._known = set(processes.descendants(os.getpid()))
        self._replace_starts()

    def _replace_starts(self) -> None:
        """Replace the functions of Python that start processes and threads."""
        functions = make_replaceable()
        functions["fork_exec"].wrap(self._marking_list)
        for name in ("posix_spawn", "posix_spawnp"):
            functions[name].wrap(self._marking_mapping)
        for name in ("fork", "forkpty"):
            functions[name].wrap(self._noting)
        functions["system"].wrap(lambda _: _system)
        for name in ("start_new_thread", "start_new"):
            functions[name].wrap(_noting_ident)
        BaseProcess.start = self._noting_start(BaseProcess.start)  # type: ignore[method-assign,assignment]
        for server in (ForkServer, ResourceTracker):  # these serve all runs
            for name in ("ensure_running", "_ensure_running_and_write"):
                if hasattr(server, name):
                    setattr(server, name, _of_no_run(getattr(server, name)))
        threading.Thread.start = _noting_thread(threading.Thread.start)  # type: ignore[assignment,method-assign]

    def end(self, run: GatedRun, *, is_stopped: bool) -> bool:
        """Kill the processes that a run has started. Return whether one of them, or a thread that
        it has started, is left."""
        if run.has_processes:
            found = self._processes_of(run, is_stopped=is_stopped)
            for process in found:
                processes.kill_with_descendants(process)
            alive = psutil.wait_procs(found, timeout=0)[1]
            with self._lock:
                run.processes = set(alive)
        return bool(run.processes) or _has_threads(run)

    def forget(self, run: GatedRun) -> None:
        """Forget the processes of a run that has ended."""
        with self._lock:
            self._known = {process for process in self._known if process.is_running()}
            run.processes.clear()

    def _processes_of(self, run: GatedRun, *, is_stopped: bool) -> set[psutil.Process]:
        """Return the processes of a run, and the orphans that they have left, whose parent is this
        process now. An orphan without a mark may be another run's; it counts as this run's if this
        run was stopped, because nothing of a stopped run may go on."""
        mine = (None, str(run.claim.run_id)) if is_stopped else (str(run.claim.run_id),)
        with self._lock:
            left = processes.child_processes(os.getpid()) - self._known
            return run.processes | {process for process in left if _mark_of(process) in mine}

    def _note(self, run: GatedRun | None, pid: int) -> None:
        with self._lock, suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            self._known.add(process)
            if run is not None:
                run.processes.add(process)
                run.has_processes = True

    def _start(self, start: Callable[[], Any]) -> Any:
        """Start a process and note it. `start` returns its id, or a tuple of it and others."""
        return uninterrupted(self._start_of, GatedRun.current(), start)

    def _start_of(self, run: GatedRun | None, start: Callable[[], Any]) -> Any:
        with self._lock:
            started = start()
            pid = started[0] if isinstance(started, tuple) else started
            if pid:  # else this is the new process
                self._note(run, pid)
        return started

    def _noting(self, start: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(start)
        def noting(*args: Any) -> Any:
            return self._start(partial(start, *args))

        return noting

    def _marking_list(self, fork_exec: Callable[..., int]) -> Callable[..., int]:
        """Wrap `fork_exec`, which takes the environment as a list of `name=value`; None means that
        of this process."""

        @wraps(fork_exec)
        def marking(*args: Any) -> int:
            if (mark := _mark()) is not None:
                env = args[_ENV]
                env = [*(_environment() if env is None else env), f"{MARK}={mark}".encode()]
                args = (*args[:_ENV], env, *args[_ENV + 1 :])
            return int(self._start(partial(fork_exec, *args)))

        return marking

    def _marking_mapping(self, spawn: Callable[..., int]) -> Callable[..., int]:
        """Wrap `posix_spawn`, which takes the environment as a mapping; None means that of this
        process, since Python 3.13."""

        @wraps(spawn)
        def marking(path: Any, argv: Any, env: Any, **options: Any) -> int:
            if (mark := _mark()) is not None:
                env = {**(_environment_by_name() if env is None else env), MARK: mark}
            return int(self._start(partial(spawn, path, argv, env, **options)))

        return marking

    def _noting_start(self, start: Callable[[BaseProcess], None]) -> Callable[[BaseProcess], None]:
        """Wrap the start of `multiprocessing`'s processes, whose parent may be its fork server."""

        @wraps(start)
        def noting(process: BaseProcess) -> None:
            run = GatedRun.current()
            try:
                start(process)
            finally:
                if process.pid is not None:
                    uninterrupted(self._note, run, process.pid)

        return noting


def _mark() -> str | None:
    run = GatedRun.current()
    return None if run is None else str(run.claim.run_id)


def _mark_of(process: psutil.Process) -> str | None:
    """Return the id of the run that has started a process, None if it has no mark."""
    try:
        environ = Path(f"/proc/{process.pid}/environ").read_bytes()
    except OSError:
        return None
    prefix = f"{MARK}=".encode()
    found = [one for one in environ.split(b"\0") if one.startswith(prefix)]
    return found[-1].removeprefix(prefix).decode(errors="replace") if found else None


def _environment() -> Iterator[bytes]:
    """Yield the environment of this process as `name=value`, with what `os.putenv` has set."""
    environ = ctypes.POINTER(ctypes.c_char_p).in_dll(ctypes.CDLL(None), "environ")
    return itertools.takewhile(lambda one: one is not None, (environ[i] for i in itertools.count()))


def _environment_by_name() -> dict[bytes, bytes]:
    pairs = (one.partition(b"=") for one in _environment())
    return {name: value for name, _, value in pairs}


def _system(command: Any) -> int:
    """Execute a command as `os.system` does, in a process that is noted."""
    command = os.fsencode(command)
    code = subprocess.call(command, shell=True, close_fds=False)  # noqa: S602  (as `os.system` does)
    return code << 8 if code >= 0 else -code


def _of_no_run(start: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function so that the processes it starts belong to no run."""

    @wraps(start)
    def apart(*args: Any, **kwargs: Any) -> Any:
        return uninterrupted(Context().run, start, *args, **kwargs)

    return apart


def _has_threads(run: GatedRun) -> bool:
    if any(thread.is_alive() for thread in run.threads):
        return True
    return bool(run.idents) and not run.idents.isdisjoint(sys._current_frames())


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
