"""An event loop for what a project has written with `async`, beside a web server that is not.

It runs in a real thread: under gevent two greenlets cannot both have a running loop, and what is
slow there must not hold up the others.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from concurrent.futures import Future


def loop_in_a_real_thread() -> asyncio.AbstractEventLoop:
    """Running, until somebody stops it."""
    made: Future[asyncio.AbstractEventLoop] = Future()

    def run() -> None:
        loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)
        loop.call_soon(made.set_result, loop)
        loop.run_forever()

    patched = sys.modules.get("gevent.monkey")
    if patched is not None and patched.is_module_patched("threading"):
        patched.get_original("_thread", "start_new_thread")(run, ())
    else:
        threading.Thread(target=run, name="belay-loop", daemon=True).start()
    return made.result()
