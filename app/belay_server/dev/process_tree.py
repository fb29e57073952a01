"""Run a tree of processes: start them, log their output, restart those that die, and stop them.

Every process is in its own process group, so Ctrl-C reaches only the parent, which then stops them
in order. On Linux the kernel signals every process when its parent dies, so none is left even after
a `kill -9` of the parent.
"""

from __future__ import annotations

import ctypes
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO, Any

import psutil

_PR_SET_PDEATHSIG = 1
_TICK_SECONDS = 0.1
_MAX_BACKOFF_SECONDS = 5.0
#: The exit code of a web process or worker that can never start, because its settings or the
#: project are invalid. It has logged the reason. (gunicorn uses it when its worker does not boot.)
CANNOT_START = 3
#: The grace period in which the other programs may end by themselves after one could not start.
_LAST_WORDS_SECONDS = 5.0
#: A process that ran for this long is restarted without delay when it dies.
_STEADY_SECONDS = 10.0


@dataclass(slots=True)
class Program:
    """One process of the tree. `before` runs before every start."""

    name: str
    command: Sequence[str]
    environ: Mapping[str, str]
    popen: Mapping[str, Any] = field(default_factory=dict)
    stop_signal: signal.Signals = signal.SIGTERM
    stop_seconds: float = 10.0
    before: Callable[[], None] | None = None
    #: Whether the others need it until they have ended. It is stopped after them.
    is_server: bool = False
    #: Whether it loads the project, and so is started again when that changes.
    loads_project: bool = False
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    start_at: float = 0.0
    backoff: float = 0.0
    _reader: threading.Thread | None = None
    _last_line: str = ""

    def start(self) -> subprocess.Popen[bytes]:
        """Start the process. Call this in the main thread: its end triggers the death signal."""
        if self.before is not None:
            self.before()
        self.process = subprocess.Popen(  # noqa: S603
            list(self.command),
            env=dict(self.environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            process_group=0,
            preexec_fn=die_with_parent(os.getpid(), self.stop_signal),  # noqa: PLW1509
            **self.popen,
        )
        self.started_at = time.monotonic()
        assert self.process.stdout is not None
        arguments = (self.process.stdout,)
        self._reader = threading.Thread(target=self._copy_lines, args=arguments, daemon=True)
        self._reader.start()
        return self.process

    def _copy_lines(self, stream: IO[bytes]) -> None:
        with stream:
            for line in stream:
                text = line.decode(errors="replace").rstrip()
                self._last_line = text or self._last_line
                say(self.name, text)

    def last_line(self) -> str:
        """Return the last line of output, of those with text, of a program that has ended."""
        if self._reader is not None:
            self._reader.join(_LAST_WORDS_SECONDS)
        return self._last_line


def die_with_parent(parent: int, death_signal: int) -> Callable[[], None] | None:
    """Return a `preexec_fn` for Popen with which the kernel signals the child when its parent dies.

    Return None on platforms other than Linux.
    """
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)

    def in_child() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, death_signal)
        if os.getppid() != parent:  # it died before the call of prctl
            os._exit(1)

    return in_child


def say(name: str, line: str) -> None:
    """Write one line to the tree's log."""
    sys.stdout.write(f"{name:<9}| {line}\n")
    sys.stdout.flush()


class ProcessTree:
    """Programs in the order of their start. At the stop, the servers are stopped last."""

    def __init__(self) -> None:
        self._programs: list[Program] = []
        self._stopping = threading.Event()
        self._reload = threading.Event()
        #: Whether a change of the project has made it invalid: then it is not a failure.
        self._may_be_invalid = False
        #: Why the tree stopped by itself. None if it did not.
        self.failure: str | None = None
        #: How often the project has been loaded again.
        self.reloads = 0
        #: Checks a changed project. While it has errors, the programs keep the code that they have
        #: loaded. None: it is not checked.
        self.check: Program | None = None
        self._is_invalid = False
        #: Called after the programs that load the project have been started again.
        self.after_reload: Callable[[], None] | None = None

    def start(self, program: Program) -> subprocess.Popen[bytes]:
        """Add a program and start it. Call this in the main thread."""
        self._programs.append(program)
        return program.start()

    def request_stop(self) -> None:
        """Make `run` return. May be called in any thread or signal handler."""
        self._stopping.set()

    def request_reload(self, changed: str) -> None:
        """Make `run` start the programs that load the project again. May be called in any
        thread."""
        say("belay", f"{changed} changed")
        self._reload.set()

    @property
    def waits_for_change(self) -> bool:
        """Return whether a change has made the project invalid and the next one is awaited."""
        return self._is_invalid or any(p.start_at == math.inf for p in self._programs)

    @property
    def stopping(self) -> threading.Event:
        return self._stopping

    @property
    def is_stopping(self) -> bool:
        return self._stopping.is_set()

    def run(self) -> None:
        """Restart programs that die, until `request_stop`. Call this in the main thread."""
        while not self._stopping.wait(_TICK_SECONDS):
            if self._reload.is_set():
                self._reload.clear()
                self._load_again()
            for program in self._programs:
                self._keep_running(program)

    def _keep_running(self, program: Program) -> None:
        now = time.monotonic()
        if program.process is not None and program.process.poll() is not None:
            code = program.process.returncode
            program.process = None
            if code == CANNOT_START and self._may_be_invalid:
                say("belay", f"{program.name} cannot start; waiting for the next change")
                program.start_at = math.inf
                return
            if code == CANNOT_START:
                self.failure = program.last_line() or f"{program.name} cannot start"
                self.request_stop()
                return
            steady = now - program.started_at > _STEADY_SECONDS
            program.backoff = (
                0.0 if steady else min(_MAX_BACKOFF_SECONDS, max(0.2, program.backoff * 2))
            )
            program.start_at = now + program.backoff
            say("belay", f"{program.name} {_ended(code)}; starting it again")
        if program.process is None and now >= program.start_at and not self.is_stopping:
            program.start()

    def _load_again(self) -> None:
        code = 0 if self.check is None else self._checked(self.check)
        if code is None:
            return
        self._is_invalid = code != 0
        if self._is_invalid:
            say("belay", "keeping the previous code; waiting for the next change")
        else:
            say("belay", "loading the project again")
            self._start_again([p for p in self._programs if p.loads_project])

    def _checked(self, check: Program) -> int | None:
        """Return the exit code of the check; None if it was interrupted by a stop or a further
        change. It takes as long as the project's imports."""
        process = check.start()
        while process.poll() is None:
            if self._stopping.wait(_TICK_SECONDS) or self._reload.is_set():
                _kill(process)
                return None
        check.last_line()  # what it has said is logged
        return process.returncode

    def _start_again(self, programs: Sequence[Program]) -> None:
        """Stop programs and start them. The runs of a worker are put back, and go on after it."""
        self._may_be_invalid = True
        _stop(programs)
        for program in programs:
            program.process, program.backoff, program.start_at = None, 0.0, 0.0
        self.reloads += 1
        if self.after_reload is not None:
            self.after_reload()

    def stop(self) -> None:
        """Stop all programs, the servers after the others. Kill those that take too long."""
        if self.failure is not None:
            self._wait_for_failed_starts()
        for are_servers in (False, True):
            _stop([p for p in self._programs if p.is_server is are_servers])

    def _wait_for_failed_starts(self) -> None:
        """Let programs that cannot start end by themselves. Kill those that take too long.

        The reason why one cannot start applies to most of them. Each logs one line and ends; if it
        were stopped before that, it would log a traceback. There is no work yet to be lost.
        """
        deadline = time.monotonic() + _LAST_WORDS_SECONDS
        for program in self._programs:
            if program.process is not None and not program.is_server:
                try:
                    program.process.wait(max(0.0, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    _kill(program.process)


def _stop(programs: Sequence[Program]) -> None:
    """Stop programs, all at once. Kill those that take too long."""
    for program in programs:
        if program.process is not None:
            with suppress(ProcessLookupError):
                program.process.send_signal(program.stop_signal)
    for program in programs:
        _wait_or_kill(program)


def _wait_or_kill(program: Program) -> None:
    if program.process is None:
        return
    try:
        program.process.wait(program.stop_seconds)
    except subprocess.TimeoutExpired:
        say("belay", f"{program.name} does not stop, killing it")
        _kill(program.process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all its descendants.

    Postgres' backends have their own sessions, and one that survives prevents the next start on the
    same data.
    """
    descendants: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        descendants = psutil.Process(process.pid).children(recursive=True)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for descendant in descendants:
        with suppress(psutil.NoSuchProcess):
            descendant.kill()
    process.wait()


def _ended(code: int) -> str:
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"
