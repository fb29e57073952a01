"""The signal handlers and timers of a host, which its runs share.

Python calls a handler on the main thread, between two instructions of the code that is executed
there, which may be another run's or Belay's own. A run's handler is called in the context of the
run. An exception is raised only in code of that run, and logged elsewhere. A copy of the process
that the handler has made by `os.fork` ends when the handler returns.

A signal for which no run has a handler, and whose default is to end the process, does nothing: a
forgotten `signal.alarm` of one run must not end all of them. A run that restores such a default, as
programs do for SIGPIPE, has no effect either.
"""

from __future__ import annotations

import _signal
import logging
import os
import signal
from collections.abc import Callable
from functools import wraps
from types import FrameType
from typing import Any

from belay_workers.child.signals import NodeSignals
from belay_workers.execution.copies import end_copy
from belay_workers.execution.stops import ASK_SIGNAL
from belay_workers.host.event_loop import HostLoop
from belay_workers.host.gated_run import GatedRun, executed_run
from belay_workers.host.replaceable_functions import make_replaceable
from belay_workers.host.tracebacks import Tracebacks

log = logging.getLogger(__name__)

#: Signals whose default is not to end the process, those that no handler receives, and those of
#: faults in native code, after which the process cannot go on.
_LEFT_ALONE = {
    signal.SIGCHLD,
    signal.SIGCONT,
    signal.SIGURG,
    signal.SIGWINCH,
    signal.SIGSTOP,
    signal.SIGTSTP,
    signal.SIGTTIN,
    signal.SIGTTOU,
    signal.SIGKILL,
    signal.SIGABRT,
    signal.SIGBUS,
    signal.SIGFPE,
    signal.SIGILL,
    signal.SIGSEGV,
    signal.SIGSYS,
    signal.SIGTRAP,
}


class _Handler:
    """A handler that a run has set."""

    def __init__(self, run: GatedRun, function: Callable[[int, FrameType | None], Any]) -> None:
        self.run = run
        self.function = function

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.run.is_frozen or self.run.is_stopped:
            return
        pid = os.getpid()
        try:
            self.run.context.copy().run(self.function, number, frame)
        except BaseException:
            if executed_run() is self.run:
                raise
            log.exception("a signal handler of run %s raised in other code", self.run.claim.run_id)
        finally:
            end_copy(pid)


class _NoHandler:
    """The handler of signals for which no run has one. Programs would inherit SIG_IGN."""

    def __init__(self) -> None:
        self._logged: set[int] = set()

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        if number not in self._logged:  # a timer may send it again and again
            self._logged.add(number)
            log.warning("ignored signal %d, which would end all runs of this process", number)


class HostSignals(NodeSignals):
    """The handlers and timers of a host. Make it on the main thread, when the host's own handlers
    are set. From then on, what runs set is known as theirs: `signal.signal` and `signal.getsignal`
    call the functions that are replaced here."""

    def __init__(self, loop: HostLoop) -> None:
        self._loop: Any = loop
        #: The runs that have set the timers.
        self._timers: dict[int, GatedRun | None] = {}
        #: The run after whose end `restore_after` was called last.
        self._ended: GatedRun | None = None
        self._set, self._get = _signal.signal, _signal.getsignal
        self._no_handler = _NoHandler()
        for number in signal.valid_signals() - _LEFT_ALONE:
            if self._get(number) == signal.SIG_DFL:
                self._set(number, self._no_handler)
        super().__init__()
        os.register_at_fork(after_in_child=self._have_the_defaults)
        _signal.signal, _signal.getsignal = self._set_of_run, self._get_as_set
        functions = make_replaceable()
        functions["setitimer"].wrap(self._noting_timer)
        functions["alarm"].wrap(self._noting_alarm)
        tracebacks = Tracebacks()
        functions["dump_traceback_later"].wrap(lambda _: tracebacks.dump_later)
        functions["cancel_dump_traceback_later"].wrap(lambda _: tracebacks.cancel)
        functions["register"].wrap(_not_for_stops)

    def restore_after(self, run: GatedRun) -> None:
        """Stop the timers of a run that has ended, and restore its handlers and the mask. Those of
        other runs in progress stay."""
        for number, handle in list(self._loop._signal_handlers.items()):
            if GatedRun.of(handle) is run:
                self._loop.remove_signal_handler(number)
        self._ended = run
        self.restore()

    def _keeps_timer(self, timer: int) -> bool:
        return self._is_anothers(self._timers.get(timer))

    def _keeps_handler(self, handler: Any) -> bool:
        return isinstance(handler, _Handler) and self._is_anothers(handler.run)

    def _is_anothers(self, run: GatedRun | None) -> bool:
        return run is not None and run is not self._ended and run.is_in_progress

    def _set_of_run(self, number: int, handler: Any) -> Any:
        run = GatedRun.current()
        if run is not None and _is_needed(number, handler):
            log.warning("ignored a handler of run %s for signal %d", run.claim.run_id, number)
            return self._get_as_set(number)
        if run is not None and callable(handler):
            handler = _Handler(run, handler)
        elif handler == signal.SIG_DFL and number not in _LEFT_ALONE:
            handler = self._handlers.get(number, handler)  # it does not end the process
        return _as_set(self._set(number, handler))

    def _get_as_set(self, number: int) -> Any:
        return _as_set(self._get(number))

    def _noting_timer(self, set_timer: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(set_timer)
        def noting(which: int, *times: float) -> Any:
            before = set_timer(which, *times)
            self._timers[which] = GatedRun.current()
            return before

        return noting

    def _noting_alarm(self, set_alarm: Callable[[int], int]) -> Callable[[int], int]:
        @wraps(set_alarm)
        def noting(seconds: int) -> int:
            left = set_alarm(seconds)
            self._timers[signal.ITIMER_REAL] = GatedRun.current()
            return left

        return noting

    def _have_the_defaults(self) -> None:
        """Restore the defaults in a process that a run has forked."""
        for number, handler in self._handlers.items():
            if handler is self._no_handler and self._get(number) is self._no_handler:
                self._set(number, _signal.SIG_DFL)


def _is_needed(number: int, handler: Any) -> bool:
    """Return whether a handler would take from the host, or from other runs, what they need: the
    supervisor's signal, or the exit codes of processes."""
    return number == ASK_SIGNAL or (number == signal.SIGCHLD and handler == signal.SIG_IGN)


def _not_for_stops(register: Callable[..., None]) -> Callable[..., None]:
    """Wrap `faulthandler.register`, so that it has no effect on the supervisor's signal."""

    @wraps(register)
    def registering(signum: int, *args: Any, **options: Any) -> None:
        if signum == ASK_SIGNAL:
            log.warning("ignored faulthandler.register() for signal %d", signum)
        else:
            register(signum, *args, **options)

    return registering


def _as_set(handler: Any) -> Any:
    """Return a handler as the code that has set it knows it."""
    if isinstance(handler, _NoHandler):
        return signal.SIG_DFL
    return handler.function if isinstance(handler, _Handler) else handler
