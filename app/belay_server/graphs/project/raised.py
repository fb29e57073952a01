"""Tell the exceptions of a project's code from those that end a request's greenlet."""

from __future__ import annotations

_OF_THE_SERVER = frozenset({"gevent", "greenlet"})


def is_of_project(error: BaseException) -> bool:
    """Return whether a project's code may have raised this. Its SystemExit, CancelledError or panic
    of a native library must not end the process that reads a state with it."""
    return type(error).__module__.partition(".")[0] not in _OF_THE_SERVER
