"""The command lines of the server's processes: what `belay web` and `belay worker` run.

Python is started with `-P`, so that a module in the current folder is not taken for one of the
libraries of the same name. The project's own folders are added to the import path from
`dependencies` in its `langgraph.json`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

_PYTHON = (sys.executable, "-P", "-m")


def web_command(options: Sequence[str] = ()) -> list[str]:
    """Return the command line of a web process: gunicorn, with further options of its own."""
    config = ("-c", "python:belay_server.gunicorn_conf")
    return [*_PYTHON, "gunicorn", *config, *options, "belay_server.factory:create_app()"]


def worker_command(options: Sequence[str] = ()) -> list[str]:
    """Return the command line of a worker: `celery worker`, with further options of its own."""
    # Workers need no messages from each other: a dead one is detected by its leases.
    silent = ("--without-gossip", "--without-mingle", "--without-heartbeat")
    worker = ("-A", "belay_workers", "--quiet", "worker", "--loglevel=INFO")
    return [*_PYTHON, "celery", *worker, *silent, *options]


def cli_command(*words: str) -> list[str]:
    """Return the command line of one of `belay`'s commands."""
    return [*_PYTHON, "belay_server", *words]


def state_process_command(fd: int) -> list[str]:
    """Return the command line of the process for large states; `fd` is its end of a socket."""
    return [*_PYTHON, "belay_server.states", str(fd)]
