"""The processes that a web process starts for the states that are large.

Decoding a state of 20 MB takes a second or more, and nobody else is served while a web process does
it. So what is larger than `BELAY_LARGE_STATE_BYTES` is read by `python -m belay_server.states`:
processes with the same project, that are started when they are needed, up to
`BELAY_STATE_PROCESSES`, do one job at a time, and end when there has been none for a minute. They
may be killed at any time: a job that takes too long, or too much memory, ends with its process.
"""

from __future__ import annotations

import logging
import pickle
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Concatenate, ParamSpec, TypeVar

from belay_server.command_lines import state_process_command
from belay_server.domain.errors import Interrupted, StateTooLarge, TooMany, Unavailable
from belay_server.graphs.checkpoints.thread_saver import LargeState
from belay_server.settings import Settings
from belay_server.states.jobs import StateParts, update_state

log = logging.getLogger(__name__)

_P = ParamSpec("_P")
_T = TypeVar("_T")
#: A process ends after so long without a job; shortly before that, it is given none any more.
IDLE_SECONDS = 60.0
_FRESH_SECONDS = 50.0
#: How long it may take to start: it imports the project.
_START_SECONDS = 60.0
#: How long one that is idle may take to end.
_EXIT_SECONDS = 0.5
_HEADER = struct.Struct("!Q")
_CHUNK = 1024 * 1024


#: Jobs that write.
WRITING = frozenset({update_state})
_TOO_LARGE = (
    "The thread's state is too large: the process that was to read it ended, for want of memory or "
    "after BELAY_STATEMENT_SECONDS. Runs can still use it."
)
_MAYBE_WRITTEN = (
    "The process that wrote the state ended in the middle; read the state before you try again"
)


class _ProcessEnded(Exception):
    """The process ended before it had done its job."""


class _TookTooLong(_ProcessEnded):
    """It was killed."""


class StateProcess:
    """Does jobs on states: small ones here, large ones in processes of their own."""

    def __init__(self, here: StateParts, whose: Callable[[], str | None]) -> None:
        """`here` are the parts of this process. `whose` returns the caller of the current request,
        for whom one large job at a time is done."""
        self.here = here
        self._whose = whose
        self._lock = threading.Lock()
        #: Those that have no job, the one that was used last at the end.
        self._free = [_Process(here.settings) for _ in range(here.settings.state_processes)]
        self._all = tuple(self._free)
        self._places = threading.Semaphore(len(self._all))
        self._callers: dict[str | None, _Turns] = {}

    def run(
        self, job: Callable[Concatenate[StateParts, _P], _T], *args: _P.args, **kwargs: _P.kwargs
    ) -> _T:
        """Do a job: a function of the module `state_jobs`. Raises what it raises; StateTooLarge for
        a state that a process of its own cannot read either, TooMany after waiting for one."""
        try:
            return job(self.here, *args, **kwargs)
        except LargeState:
            return self.run_aside(job, *args, **kwargs)

    def run_aside(
        self, job: Callable[Concatenate[Any, _P], _T], *args: _P.args, **kwargs: _P.kwargs
    ) -> _T:
        """Do a job in a process of its own in any case. Raises the same."""
        return self.run_for(self._whose(), job, *args, **kwargs)

    def run_for(
        self,
        caller: str | None,
        job: Callable[Concatenate[Any, _P], _T],
        *args: _P.args,
        **kwargs: _P.kwargs,
    ) -> _T:
        """Do a job in a process of its own for a caller whose request is not the current one, such
        as that of a stream. Raises the same."""
        message = pickle.dumps((job, args, kwargs))
        with self._turn_of(caller), self._process() as process:
            error, result = process.done(message, writes=job in WRITING)
        if error is not None:
            raise error
        return result  # type: ignore[no-any-return]

    def close(self) -> None:
        """End the processes, with the jobs that they do."""
        for process in self._all:
            process.end()

    @contextmanager
    def _turn_of(self, caller: str | None) -> Iterator[None]:
        """Wait for the caller's other jobs: one of each caller is done at a time, so that the
        others find a process."""
        with self._lock:
            turns = self._callers.setdefault(caller, _Turns())
            turns.users += 1
        try:
            with _held(turns.lock, self.here.settings.statement_seconds):
                yield
        finally:
            with self._lock:
                turns.users -= 1
                if turns.users == 0:
                    del self._callers[caller]

    @contextmanager
    def _process(self) -> Iterator[_Process]:
        with _held(self._places, self.here.settings.statement_seconds):
            with self._lock:
                process = self._free.pop()
            try:
                yield process
            finally:
                with self._lock:
                    self._free.append(process)


class _Process:
    """One process, started when it is first needed, and again when it has ended."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._used_at = 0.0

    def done(self, job: bytes, *, writes: bool) -> Any:
        """Have the process do a job. One that only reads is done again, once, if the process ends
        in the middle; after that, and when it takes too long, the state is taken for too large.

        Raises StateTooLarge; Interrupted for a job that writes.
        """
        try:
            return self._call(job)
        except _ProcessEnded as error:
            if writes:
                raise Interrupted(_MAYBE_WRITTEN) from error
            if isinstance(error, _TookTooLong):
                raise StateTooLarge(_TOO_LARGE) from error
        try:
            return self._call(job)
        except _ProcessEnded as error:
            raise StateTooLarge(_TOO_LARGE) from error

    def _call(self, job: bytes) -> Any:
        """Raises _ProcessEnded."""
        connection = self._connected()
        connection.settimeout(self._settings.statement_seconds)
        try:
            send(connection, job)
            answer = receive(connection)
        except TimeoutError as error:
            log.warning("a job on a large state took too long; its process is killed")
            self.end()
            raise _TookTooLong from error
        except OSError as error:
            log.warning("the process for large states ended with status %s", self.end())
            raise _ProcessEnded from error
        except BaseException:  # such as a request that is abandoned: the answer would be the next's
            self.end()
            raise
        self._used_at = time.monotonic()
        return pickle.loads(answer)  # noqa: S301  (of our own process)

    def _connected(self) -> socket.socket:
        if self._socket is not None and time.monotonic() - self._used_at < _FRESH_SECONDS:
            return self._socket
        if self._process is not None:
            self.end()
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603  (our own)
                state_process_command(theirs.fileno()),
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        ours.settimeout(_START_SECONDS)
        self._socket, self._used_at = ours, time.monotonic()
        try:
            send(ours, pickle.dumps(self._settings))
            receive(ours)
        except OSError as error:
            self.end()
            raise Unavailable("The process for large states did not start; see the log") from error
        except BaseException:
            self.end()
            raise
        return ours

    def end(self) -> int | None:
        """End the process; returns its exit status, None without a process."""
        process, self._process = self._process, None
        connection, self._socket = self._socket, None
        if connection is not None:
            connection.close()
        if process is None:
            return None
        with suppress(subprocess.TimeoutExpired):
            return process.wait(_EXIT_SECONDS)
        process.kill()
        return process.wait()


class _Turns:
    """The jobs of one caller, one after the other."""

    __slots__ = ("lock", "users")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0


@contextmanager
def _held(lock: threading.Lock | threading.Semaphore, seconds: float) -> Iterator[None]:
    if not lock.acquire(timeout=seconds):
        raise TooMany("Other large states are being read; try again later")
    try:
        yield
    finally:
        lock.release()


def send(connection: socket.socket, message: bytes) -> None:
    """Send a message. Raises OSError."""
    connection.sendall(_HEADER.pack(len(message)))
    connection.sendall(message)


def receive(connection: socket.socket) -> bytes | bytearray:
    """Receive a message. Raises OSError, also when the connection ends."""
    (size,) = _HEADER.unpack(_receive(connection, _HEADER.size))
    return _receive(connection, size)


def _receive(connection: socket.socket, size: int) -> bytearray:
    received = bytearray(size)
    view = memoryview(received)
    at = 0
    while at < size:
        count = connection.recv_into(view[at : at + _CHUNK])
        if count == 0:
            raise ConnectionResetError("the other process has ended")
        at += count
    return received


def picklable(error: BaseException) -> BaseException:
    """Return the error, or one that says the same, where it cannot be pickled."""
    with suppress(Exception):
        pickle.loads(pickle.dumps(error))  # noqa: S301  (of this very process)
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")
