"""The signal of a stop request, and what its handler raises in code that does not await."""

from __future__ import annotations

import signal
from types import FrameType

#: Sent when a stop request has been written into a slot. It is ignored by default, so a late signal
#: does no harm, and nothing else here uses it.
ASK_SIGNAL = signal.SIGURG


class RunCancelled(BaseException):
    """Raised in the code of a run that is being stopped: in a synchronous node, or in asynchronous
    code that blocks its event loop.

    Not an Exception, so that `except Exception` in a node does not swallow it; `finally` and
    `with` blocks run.
    """


def is_importing(frame: FrameType | None) -> bool:
    """Return whether a module is imported on this stack.

    An exception in the middle of an import leaves submodules without their package: every later
    import of it in the same process fails.
    """
    while frame is not None:
        if frame.f_globals.get("__name__") == "importlib._bootstrap":
            return True
        frame = frame.f_back
    return False
