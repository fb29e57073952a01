"""Start an event loop for a project's `async` code, in a web server that is not async.

It runs in a native thread: under gevent, two greenlets cannot both have a running event loop, and
slow code in it must not block other requests.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from concurrent.futures import Future

log = logging.getLogger(__name__)


def loop_in_a_real_thread() -> asyncio.AbstractEventLoop:
    """Return an event loop that runs until it is stopped. It continues when a task raises
    SystemExit or KeyboardInterrupt, which asyncio lets through."""
    made: Future[asyncio.AbstractEventLoop] = Future()

    def run() -> None:
        loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)
        loop.call_soon(made.set_result, loop)
        is_stopped = False
        while not is_stopped:
            try:
                loop.run_forever()
                is_stopped = True
            except (SystemExit, KeyboardInterrupt) as error:
                log.exception("the project's async code raised %s", type(error).__name__)

    patched = sys.modules.get("gevent.monkey")
    if patched is not None and patched.is_module_patched("threading"):
        patched.get_original("_thread", "start_new_thread")(run, ())
    else:
        threading.Thread(target=run, name="belay-loop", daemon=True).start()
    return made.result()
