"""Build the command lines of the server's processes, which `belay web` and `belay worker` run.

Python is started with `-P`, so that a module in the current folder does not shadow a library of the
same name. The project's own folders are added to the import path from `dependencies` in its
`langgraph.json`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

_PYTHON = (sys.executable, "-P", "-m")


def web_command(options: Sequence[str] = ()) -> list[str]:
    """Return the command line of the web process: gunicorn with its further `options`."""
    config = ("-c", "python:belay_server.gunicorn_conf")
    return [*_PYTHON, "gunicorn", *config, *options, "belay_server.factory:create_app()"]


def worker_command(options: Sequence[str] = ()) -> list[str]:
    """Return the command line of a worker: `celery worker` with its further `options`."""
    # Workers need no messages from each other: a dead worker is detected by its expired leases.
    silent = ("--without-gossip", "--without-mingle", "--without-heartbeat")
    worker = ("-A", "belay_workers", "--quiet", "worker", "--loglevel=INFO")
    return [*_PYTHON, "celery", *worker, *silent, *options]


def guardian_command(watched: int, slots: int, *, parent: int, seconds: float) -> list[str]:
    """Return the command line of a worker's guardian, with the file descriptors that it inherits:
    one of its parent process, and that of the slots."""
    arguments = (str(watched), str(slots), str(parent), str(seconds))
    return [*_PYTHON, "belay_workers.supervision.guardian", *arguments]


def mismatch_command() -> list[str]:
    """Return the command line of the process that locates a mismatch of an Agent run's output."""
    return [*_PYTHON, "belay_server.services.agent_runs.output_mismatch"]


def cli_command(*words: str) -> list[str]:
    """Return the command line of one of `belay`'s commands."""
    return [*_PYTHON, "belay_server", *words]


def state_process_command(fd: int) -> list[str]:
    """Return the command line of the state process. `fd` is its end of a socket pair."""
    return [*_PYTHON, "belay_server.states", str(fd)]
