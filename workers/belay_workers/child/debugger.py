"""Let a debugger attach to a child process: `belay dev --debug-port`."""

from __future__ import annotations

import logging
import threading

log = logging.getLogger(__name__)


def listen(port: int) -> None:
    """Wait for a debugger on this port of the loopback interface, with a process of debugpy's.

    Call this before any other thread is started, as it traces later ones only.
    """
    import debugpy  # noqa: PLC0415  (only with --debug-port, which checks that it is installed)

    debugpy.configure(subProcess=False)
    try:
        debugpy.listen(("127.0.0.1", port))
    except RuntimeError as error:  # the port is in use, as by a worker with several children
        log.warning("no debugger can attach to this child: %s", error)


def is_debuggers(thread: threading.Thread) -> bool:
    """Return whether a thread belongs to debugpy, which starts some when a debugger attaches."""
    return bool(getattr(thread, "is_pydev_daemon_thread", False))
