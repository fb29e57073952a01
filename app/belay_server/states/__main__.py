"""python -m belay_server.states FD: the process that reads and writes large states.

A web process starts it (`states.process`) and sends it the settings, then job after job, over the
socket FD. It ends with the web process, or after a minute without a job.
"""

from __future__ import annotations

from belay_server.runtime import startup_gc  # isort: skip  (before the large imports)

import gc
import logging
import os
import pickle
import signal
import socket
import sys
from contextlib import suppress
from typing import Any

import orjson

from belay_server.bus.project_cache import ProjectCache
from belay_server.configuration.settings import Settings
from belay_server.db.postgres.pool import Database, open_pool
from belay_server.domain.errors import BelayError, StateTooLarge
from belay_server.graphs.checkpoints.own_checkpointer import api_checkpointer
from belay_server.graphs.checkpoints.thread_saver import LargeState
from belay_server.graphs.project.langgraph_json import read_project
from belay_server.graphs.project.loopback import Loopback
from belay_server.graphs.registry import GraphRegistry
from belay_server.runtime import allocator, logs
from belay_server.states.jobs import StateParts
from belay_server.states.memory import limit_memory
from belay_server.states.process import IDLE_SECONDS, picklable, receive, send

log = logging.getLogger(__name__)

#: How many times a state's stored bytes this process may allocate. orjson alone reserves up to 16
#: times the length of a text (most of which it never touches), and crashes if it cannot.
_MEMORY = 24


def main() -> None:
    """Serve a web process at a lower priority than its own. Return when it has ended or has sent no
    job for a minute."""
    os.nice(5)
    if sys.platform == "linux":
        allocator.return_large_blocks()
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        settings: Settings = pickle.loads(receive(connection))  # noqa: S301  (of our web process)
        logs.configure(settings)
        parts = _parts(settings)
        limit_memory(_MEMORY * settings.max_answer_bytes)
        startup_gc.started()
        with suppress(OSError):  # the web process has ended, or there was no job for a minute
            _serve(connection, parts)


def _serve(connection: socket.socket, parts: StateParts) -> None:
    """Do each job that is received. Raise OSError when there are no more."""
    send(connection, b"")
    connection.settimeout(IDLE_SECONDS)
    while True:
        job, args, kwargs = pickle.loads(receive(connection))  # noqa: S301
        # The web process kills this process sooner, unless it has ended itself.
        signal.alarm(int(parts.settings.statement_seconds) + 5)
        answer = pickle.dumps(_done(parts, job, args, kwargs))
        signal.alarm(0)
        send(connection, answer)
        del job, args, kwargs, answer
        _tidy()


def _parts(settings: Settings) -> StateParts:
    pool = open_pool(
        settings.database_url,
        size=2,
        pgbouncer=settings.pgbouncer,
        name="belay states",
        statement_seconds=settings.statement_seconds,
    )
    ProjectCache(settings).install()
    project = read_project(settings.config_path)
    Loopback(project.url_in(settings.internal_url), dict).install()
    graphs = GraphRegistry.load(project)
    return StateParts(
        settings,
        graphs,
        Database(pool),
        most_bytes=settings.max_answer_bytes,
        checkpointer=api_checkpointer(graphs.own_checkpointer),
    )


def _tidy() -> None:
    """Free the memory of the last job, so that the next one has all of it."""
    gc.collect()
    if sys.platform == "linux":
        allocator.return_free_memory()


def _done(parts: StateParts, job: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Do a job. Return its error or None, and its result."""
    try:
        return None, job(parts, *args, **kwargs)
    except LargeState as error:
        return StateTooLarge(
            f"The thread's state is too large ({error}; BELAY_MAX_ANSWER_BYTES is "
            f"{parts.settings.max_answer_bytes:,}). Runs can still use it."
        ), None
    except BelayError as error:
        return error, None
    except Exception as error:
        if _is_out_of_memory(error):
            log.warning(
                "a large state needs more memory than BELAY_MAX_ANSWER_BYTES times %d, refusing it",
                _MEMORY,
            )
            return StateTooLarge(), None
        log.exception("a job on a large state failed, returning its error to the web process")
        return picklable(error), None


def _is_out_of_memory(error: Exception) -> bool:
    """Return whether memory could not be allocated. orjson raises no MemoryError then."""
    if isinstance(error, orjson.JSONDecodeError):
        return "Not enough memory" in str(error)
    return isinstance(error, MemoryError)


if __name__ == "__main__":
    main()
