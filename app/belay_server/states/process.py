"""The processes that a web process starts for large states.

Decoding a state of 20 MB takes a second or more, and blocks all requests of a web process. So a
state larger than `BELAY_LARGE_STATE_BYTES` is read by `python -m belay_server.states`: processes
with the same project that are started when needed, up to `BELAY_STATE_PROCESSES`. Each does one job
at a time, and ends after a minute without one. They may be killed at any time: a job that takes too
long or too much memory ends with its process.
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

from belay_server.configuration.command_lines import state_process_command
from belay_server.configuration.settings import Settings
from belay_server.domain.errors import Interrupted, StateTooLarge, TooMany, Unavailable
from belay_server.graphs.checkpoints.thread_saver import LargeState
from belay_server.states.jobs import StateParts, update_state

log = logging.getLogger(__name__)

_P = ParamSpec("_P")
_T = TypeVar("_T")
#: A process ends after this time without a job. Shortly before that, it gets no new one.
IDLE_SECONDS = 60.0
_FRESH_SECONDS = 50.0
#: Seconds that a process may take to start: it imports the project.
_START_SECONDS = 60.0
#: Seconds that an idle process may take to end.
_EXIT_SECONDS = 0.5
_HEADER = struct.Struct("!Q")
_CHUNK = 1024 * 1024


#: Jobs that write.
WRITING = frozenset({update_state})
_TOO_LARGE = (
    "The thread's state is too large: the process that read it ended, out of memory or after "
    "BELAY_STATEMENT_SECONDS. Runs can still use it."
)
_MAYBE_WRITTEN = (
    "The process that wrote the state ended before it was done. Read the state, then try again."
)


class _ProcessEnded(Exception):
    """The process ended before its job was done."""


class _TookTooLong(_ProcessEnded):
    """The process was killed because its job exceeded the time limit."""


class StateProcess:
    """Does jobs on states: small ones in the web process, large ones in state processes."""

    def __init__(self, here: StateParts, whose: Callable[[], str | None]) -> None:
        """Take the parts of this process, `here`. `whose` returns the caller of the current
        request: each caller has one large job at a time."""
        self.here = here
        self._whose = whose
        self._lock = threading.Lock()
        #: Processes without a job. The one that was used last is at the end.
        self._free = [_Process(here.settings) for _ in range(here.settings.state_processes)]
        self._all = tuple(self._free)
        self._places = threading.Semaphore(len(self._all))
        self._callers: dict[str | None, _Turns] = {}

    def run(
        self, job: Callable[Concatenate[StateParts, _P], _T], *args: _P.args, **kwargs: _P.kwargs
    ) -> _T:
        """Do a job, a function of the module `jobs`, and return its result. Raise what it raises.

        Raise StateTooLarge if a state process cannot read the state either, TooMany if the wait for
        one is too long, Unavailable if none starts, Interrupted if one ends during a write.
        """
        try:
            return job(self.here, *args, **kwargs)
        except LargeState:
            return self.run_aside(job, *args, **kwargs)

    def run_aside(
        self, job: Callable[Concatenate[Any, _P], _T], *args: _P.args, **kwargs: _P.kwargs
    ) -> _T:
        """Do a job in a state process in any case. Raise the same as `run`."""
        return self.run_for(self._whose(), job, *args, **kwargs)

    def run_for(
        self,
        caller: str | None,
        job: Callable[Concatenate[Any, _P], _T],
        *args: _P.args,
        **kwargs: _P.kwargs,
    ) -> _T:
        """Do a job in a state process for a caller whose request is not the current one, such as
        that of a stream. Raise the same as `run`."""
        message = pickle.dumps((job, args, kwargs))
        with self._turn_of(caller), self._process() as process:
            error, result = process.done(message, writes=job in WRITING)
        if error is not None:
            raise error
        return result  # type: ignore[no-any-return]

    def close(self) -> None:
        """End the processes and the jobs that they are doing."""
        for process in self._all:
            process.end()

    @contextmanager
    def _turn_of(self, caller: str | None) -> Iterator[None]:
        """Wait for the caller's other jobs: each caller has one at a time, so that processes are
        free for other callers. Raise TooMany on timeout."""
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
    """One process. It is started when first needed, and again after it has ended."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._used_at = 0.0

    def done(self, job: bytes, *, writes: bool) -> Any:
        """Do a job in the process, and return its error and its result.

        Raise Interrupted if the process ends during a job that writes. Do any other job once more,
        then raise StateTooLarge; after the time limit, raise it at once. Raise Unavailable if the
        process does not start.
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
        """Do a job once. Raise _ProcessEnded, or Unavailable if the process does not start."""
        connection = self._connected()
        connection.settimeout(self._settings.statement_seconds)
        try:
            send(connection, job)
            answer = receive(connection)
        except TimeoutError as error:
            log.warning("a job on a large state took too long; killing its process")
            self.end()
            raise _TookTooLong from error
        except OSError as error:
            log.warning(
                "the process for large states ended during a job, with status %s", self.end()
            )
            raise _ProcessEnded from error
        except BaseException:  # such as an abandoned request: the next would get its answer
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
            raise Unavailable(
                "The process for large states did not start. Read the log."
            ) from error
        except BaseException:
            self.end()
            raise
        return ours

    def end(self) -> int | None:
        """End the process and return its exit status. None without a process."""
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
    """The lock that does the jobs of one caller one by one, and the number of those jobs."""

    __slots__ = ("lock", "users")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0


@contextmanager
def _held(lock: threading.Lock | threading.Semaphore, seconds: float) -> Iterator[None]:
    if not lock.acquire(timeout=seconds):
        raise TooMany("Other large states are being read. Try again later.")
    try:
        yield
    finally:
        lock.release()


def send(connection: socket.socket, message: bytes) -> None:
    """Send a message. Raise OSError if the connection has ended."""
    connection.sendall(_HEADER.pack(len(message)))
    connection.sendall(message)


def receive(connection: socket.socket) -> bytes | bytearray:
    """Receive a message. Raise OSError on timeout or if the connection ends."""
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
    """Return the error, or a RuntimeError with its text if it cannot be pickled."""
    with suppress(Exception):
        pickle.loads(pickle.dumps(error))  # noqa: S301  (of this very process)
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")
