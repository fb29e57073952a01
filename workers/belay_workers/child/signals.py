"""Make a worker's children ignore the signals that end programs.

A platform that stops a worker may signal all of its processes: Heroku and systemd do so by default,
and so does Ctrl-C. Only the supervisor ends children, after their runs have been put back or ended.
So these signals have no effect on a child, from the first instruction after the fork.

The handler is a function and not SIG_IGN, which programs started by a node would inherit. Those
have the default handlers, and so have processes that a node forks (`multiprocessing`).
"""

from __future__ import annotations

import os
import signal
from types import FrameType

_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


class ChildSignals:
    """Sets the handlers around each fork. Make it once in the parent, before the pool forks."""

    def __init__(self) -> None:
        self._parent = os.getpid()
        os.register_at_fork(
            before=self._block, after_in_parent=self._unblock, after_in_child=self._after_fork
        )

    def _block(self) -> None:
        """Delay signals during a fork: in the child, the parent's handlers would receive them."""
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)

    def _unblock(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def _after_fork(self) -> None:
        if os.getppid() == self._parent:
            do_nothing_at_ending_signals()
        else:
            have_the_defaults()
        self._unblock()


def do_nothing_at_ending_signals() -> None:
    """Ignore the signals in a child. Call it on the main thread, also after Celery's pool has set
    its handlers."""
    for number in _ENDING:
        signal.signal(number, _do_nothing)


def have_the_defaults() -> None:
    """Restore the default handlers in a process that a node has forked."""
    for number in _ENDING:
        if signal.getsignal(number) is _do_nothing:
            signal.signal(number, signal.SIG_DFL)


def _do_nothing(_number: int, _frame: FrameType | None) -> None:
    pass
