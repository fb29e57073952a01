"""Keep signals from ending a worker's children, and a node's own signals from outliving the node.

A platform that stops a worker may signal all of its processes: Heroku and systemd do so by default,
and so does Ctrl-C. Only the supervisor ends children, after their runs have been put back or ended.
So these signals have no effect on a child, from the first instruction after the fork.

The handler is a function and not SIG_IGN, which programs started by a node would inherit. Those
have the default handlers, and so have processes that a node forks (`multiprocessing`).

A synchronous node runs on the main thread, where it may set signal handlers and timers. An alarm of
a node that was cancelled would fire in the next run of the child, which may be another caller's.
"""

from __future__ import annotations

import logging
import os
import signal
from _signal import getsignal  # `signal.getsignal` makes an enum of each, at 30 times the cost
from types import FrameType
from typing import Any

log = logging.getLogger(__name__)

_TIMERS = (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)
_MOST_TRIES = 100
#: The signals by which a platform ends processes.
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


class ChildSignals:
    """Sets the handlers around each fork. Make it once in the parent, before the first fork."""

    def __init__(self) -> None:
        self._parent = os.getpid()
        os.register_at_fork(
            before=self._block, after_in_parent=self._unblock, after_in_child=self._after_fork
        )

    def of_children_of(self, pid: int) -> None:
        """Expect that this process, in which it is called, forks the children."""
        self._parent = pid

    def _block(self) -> None:
        """Delay signals during a fork: in the child, the parent's handlers would receive them."""
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)

    def _unblock(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def _after_fork(self) -> None:
        if os.getppid() == self._parent:
            do_nothing_at_ending_signals()
        else:
            have_the_defaults()
        self._unblock()


def do_nothing_at_ending_signals() -> None:
    """Ignore the signals in a child. Call it on the main thread."""
    for number in ENDING:
        signal.signal(number, _do_nothing)


def have_the_defaults() -> None:
    """Restore the default handlers in a process that a node has forked."""
    for number in ENDING:
        if signal.getsignal(number) is _do_nothing:
            signal.signal(number, signal.SIG_DFL)


def _do_nothing(_number: int, _frame: FrameType | None) -> None:
    pass


class NodeSignals:
    """Undoes what nodes do to the signals of their child. Make it on the main thread, before any
    node runs, when the child's own handlers are set."""

    def __init__(self) -> None:
        self._handlers: dict[int, Any] = {
            number: handler
            for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}
            if (handler := getsignal(number)) is not None
        }
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())

    def restore(self) -> None:
        """Stop all timers, and restore the handlers and the mask. Call it on the main thread.

        A handler of the node may still be called meanwhile, and raise: then start again. Raises
        RuntimeError when that does not end.
        """
        for _ in range(_MOST_TRIES):
            try:
                self._restore()
            except BaseException as error:  # noqa: BLE001  (of the node's handler)
                log.warning("a signal handler of a node raised after the node's end: %r", error)
            else:
                return
        raise RuntimeError("the signal handlers of the child cannot be restored")

    def _restore(self) -> None:
        for timer in _TIMERS:
            if not self._keeps_timer(timer):
                signal.setitimer(timer, 0)
        for number, handler in self._handlers.items():
            if (present := getsignal(number)) != handler and not self._keeps_handler(present):
                signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def _keeps_timer(self, _timer: int) -> bool:
        """Return whether a timer is not stopped: one of another run, in a host."""
        return False

    def _keeps_handler(self, _handler: Any) -> bool:
        """Return whether a handler is left: one of another run, in a host."""
        return False
