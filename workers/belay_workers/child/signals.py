"""The signals that end programs, as a worker's children take them: not at all.

A platform that stops a worker may signal every process of it: Heroku and systemd do by default, and
so does Ctrl-C. Only the supervisor ends children, once their runs are put back or ended; so from
the first instruction after the fork these signals do nothing to a child.

The handler is a function, and not SIG_IGN, which programs started by a node would inherit: they
have the defaults, and so has what a node forks (`multiprocessing`).
"""

from __future__ import annotations

import os
import signal
from types import FrameType

_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


class ChildSignals:
    """Made once in the parent, before its pool forks."""

    def __init__(self) -> None:
        self._parent = os.getpid()
        os.register_at_fork(
            before=self._block, after_in_parent=self._unblock, after_in_child=self._after_fork
        )

    def _block(self) -> None:
        """What comes during a fork waits: in the child the parent's handlers would take it."""
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
    """In a child; again after Celery's pool has set its own handlers. On the main thread."""
    for number in _ENDING:
        signal.signal(number, _do_nothing)


def have_the_defaults() -> None:
    """In what a node has forked: whoever made it may end it."""
    for number in _ENDING:
        if signal.getsignal(number) is _do_nothing:
            signal.signal(number, signal.SIG_DFL)


def _do_nothing(_number: int, _frame: FrameType | None) -> None:
    pass
