"""The zygote: the process that a worker's children are forked from.

A fork copies the locks that other threads hold at that moment, and no thread of the child will
release them. The parent of a worker has threads, which resolve names, connect to servers and write
logs. So it forks no children itself: the zygote, forked before these threads start, has the loaded
graphs and one thread, and does nothing but fork.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from functools import partial
from typing import NoReturn

from belay_workers.child.signals import ChildSignals
from belay_workers.supervision.processes import end_when_parent_dies

log = logging.getLogger(__name__)

#: Messages to the zygote: fork a child, fork a host, end.
CHILD = b"c"
HOST = b"h"
_END = b"e"
_LOOK_MILLISECONDS = 500
_END_SECONDS = 5.0


class Zygote:
    """The parent's side. Make it on the main thread, before the parent has other threads."""

    def __init__(
        self,
        child_signals: ChildSignals,
        bodies: Mapping[bytes, Callable[[socket.socket], None]],
        children_in_use: Callable[[], Collection[int]],
    ) -> None:
        """`bodies` are those of a CHILD and of a HOST. `children_in_use` returns the process ids
        that must not be reaped yet: those with a slot."""
        self._connection, theirs = socket.socketpair()
        flush_standard_streams()
        self.pid = os.fork()
        if self.pid == 0:

            def run() -> None:
                self._connection.close()
                end_when_parent_dies()
                child_signals.of_children_of(os.getpid())
                _fork_on_request(theirs, bodies, children_in_use)

            _exit_after(run)
        theirs.close()

    def fork(self, kind: bytes = CHILD) -> socket.socket:
        """Have a process forked, and return the connection to it at once. Raises OSError if the
        zygote has died."""
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(self._connection, [kind], [theirs.fileno()])
        return ours

    def has_died(self) -> bool:
        try:
            return os.waitpid(self.pid, os.WNOHANG)[0] == self.pid
        except ChildProcessError:
            return True

    def stop(self) -> None:
        """End the zygote, which kills the children that it still has. Call it when their runs have
        been ended or put back."""
        with suppress(OSError):
            self._connection.sendall(_END)
        self._connection.close()
        ends_at = time.monotonic() + _END_SECONDS
        while not self.has_died():
            if time.monotonic() > ends_at:
                with suppress(ProcessLookupError):
                    os.kill(self.pid, signal.SIGKILL)
            time.sleep(0.005)


def _fork_on_request(
    connection: socket.socket,
    bodies: Mapping[bytes, Callable[[socket.socket], None]],
    in_use: Callable[[], Collection[int]],
) -> None:
    """Run the zygote until the parent ends it. Then kill the children: those that have only just
    started would be stopped for ever, as the kernel stops them when the zygote ends
    (`processes.stop_when_parent_dies`).

    When the parent has died, the children are left to the guardian, which also finds the processes
    that their nodes have started.
    """
    with open(os.devnull, "rb") as nothing:  # noqa: PTH123
        os.dup2(nothing.fileno(), 0)  # a node that reads from the terminal finds it empty
    children: set[int] = set()
    poller = select.poll()
    poller.register(connection, select.POLLIN)
    while True:
        if poller.poll(_LOOK_MILLISECONDS):
            message, descriptors, _flags, _address = socket.recv_fds(connection, 1, 1)
            if not message:
                return
            if message == _END:
                break
            os.set_inheritable(descriptors[0], False)  # programs that a node starts do not get it
            with socket.socket(fileno=descriptors[0]) as for_child:
                try:
                    pid = os.fork()
                except OSError as error:  # no memory or no process left; the parent tries again
                    log.error("cannot fork a child process: %s", error)  # noqa: TRY400
                    continue
                if pid == 0:
                    connection.close()
                    _exit_after(partial(bodies[message], for_child))
            children.add(pid)
        children -= {pid for pid in children - set(in_use()) if _has_been_reaped(pid)}
    for pid in children:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _has_been_reaped(pid: int) -> bool:
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:  # where the project ignores SIGCHLD, the kernel reaps
        return True


def flush_standard_streams() -> None:
    """Write what is buffered: a forked process would write it again."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()


def _exit_after(body: Callable[[], None]) -> NoReturn:
    """Run the body of a forked process, and exit. Nothing of the process that it was forked from is
    executed: no `finally` of its callers, no exit handler."""
    code = 1
    try:
        body()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        log.exception("process %d ends", os.getpid())
    finally:
        flush_standard_streams()
        os._exit(code)
