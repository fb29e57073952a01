"""Configure gunicorn, the server of the web process.

gunicorn -c python:belay_server.gunicorn_conf "belay_server.factory:create_app()"

gevent workers hold thousands of open streams and waiting requests in one process. The monkey patch
comes before the import of anything that opens sockets or makes locks.
"""

from __future__ import annotations

import gevent.os
from gevent import monkey

monkey.patch_all()

import atexit
import ctypes
import multiprocessing.connection
import os
import secrets
import shutil
import signal
import sys
import tempfile
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gunicorn.arbiter import Arbiter
    from gunicorn.workers.base import Worker


from belay_server.configuration.project_env import add_project_env
from belay_server.configuration.settings import SERVER_TOKEN, SettingsError

# `multiprocessing` reads its pipes with the original `os.read`, which gevent does not replace. A
# thread of the project that waits for a queue (loguru's `enqueue=True`) would stop the process.
multiprocessing.connection.Connection._recv.__defaults__ = (gevent.os.tp_read,)  # type: ignore[attr-defined]


def _remove_if_master(folder: str, master: int) -> None:
    """Remove the folder when the master exits. Forked workers inherit this exit handler."""
    if os.getpid() == master:
        shutil.rmtree(folder, ignore_errors=True)


try:
    add_project_env(os.environ)
except SettingsError as error:
    print(f"belay web: {error}", file=sys.stderr, flush=True)
    sys.exit(3)
# Authenticates the project's code in these processes (`api.project.code_access`).
os.environ[SERVER_TOKEN] = secrets.token_urlsafe(32)
bind = os.environ.get("BELAY_BIND") or f"0.0.0.0:{os.environ.get('PORT', '2024')}"
workers = int(os.environ.get("WEB_CONCURRENCY", "1"))
worker_class = "gevent"
worker_connections = int(os.environ.get("BELAY_WEB_CONNECTIONS", "10000"))
# In seconds. Open streams must not delay a restart: they are closed, and clients resume them.
graceful_timeout = 2
timeout = 60
# In seconds. This is also the time limit for receiving a request's headers.
keepalive = int(os.environ.get("BELAY_HEADER_SECONDS", "75"))
# gunicorn logs warnings and errors. The reverse proxy logs requests, or Belay (BELAY_ACCESS_LOG).
accesslog = None
loglevel = "warning"

if workers > 1 and "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
    # A scrape reaches one process and must report the counts of all: they share files.
    metrics_folder = tempfile.mkdtemp(prefix="belay-metrics-")
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = metrics_folder
    atexit.register(_remove_if_master, metrics_folder, os.getpid())

# No request header may set the path at which this application is mounted.
forwarder_headers = ""
forwarded_allow_ips = os.environ.get("FORWARDED_ALLOW_IPS", "127.0.0.1")


def post_fork(server: Arbiter, worker: Worker) -> None:
    """Disable the garbage collector until the worker has loaded. Bind its life to the master's."""
    from belay_server.runtime import startup_gc  # noqa: F401, PLC0415  (disables the garbage collector)

    if sys.platform == "linux":
        from belay_server.runtime import allocator  # noqa: PLC0415

        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
        allocator.return_large_blocks()


def post_worker_init(worker: Worker) -> None:
    """Enable the garbage collector. The objects that the worker has loaded stay excluded."""
    from belay_server.runtime import startup_gc  # noqa: PLC0415
    from belay_server.runtime.turns import Turns  # noqa: PLC0415

    worker.request_turns = Turns()
    startup_gc.started()


def pre_request(worker: Worker, req: Any) -> None:
    """Let requests begin one by one, the callers in turn.

    Otherwise hundreds of requests that one client sends at once are all worked on before the next
    request of another client, and a connection whose next request is already in the socket's buffer
    (pipelining) is served without interruption for as long as the client sends.
    """
    with worker.request_turns.turn(_caller_of(req)):
        pass


def _caller_of(req: Any) -> str:
    """Return the credentials of a request, which are not checked yet, or its client's address."""
    headers = dict(req.headers)
    address = req.peer_addr
    host = address[0] if isinstance(address, tuple) else str(address)
    return headers.get("AUTHORIZATION") or headers.get("X-API-KEY") or str(host)


def worker_exit(server: Arbiter, worker: Worker) -> None:
    """Close the application's connections while the event loop still runs."""
    application = getattr(worker, "wsgi", None)
    if application is not None:
        application.extensions["belay"].close()


def child_exit(server: Arbiter, worker: Worker) -> None:
    """Drop the ended worker's gauges of live state from the shared metrics. Its counts remain."""
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        from prometheus_client.multiprocess import mark_process_dead  # noqa: PLC0415

        mark_process_dead(worker.pid)  # type: ignore[no-untyped-call]


def on_starting(server: Arbiter) -> None:
    """Give gunicorn's own log Belay's filters and format. Check the bind addresses."""
    from belay_server.runtime.logs import (  # noqa: PLC0415
        formatter,
        without_failed_boots,
        without_request_lines,
    )

    server.log.error_log.addFilter(without_request_lines)
    server.log.error_log.addFilter(without_failed_boots)
    for handler in server.log.error_log.handlers:
        if os.environ.get("BELAY_LOG_FORMAT", "").strip().lower() == "json":
            handler.setFormatter(formatter("json"))
    _check_exposure(server.cfg.address)


def when_ready(server: Arbiter) -> None:
    """Log the bind addresses. gunicorn's own message has level INFO, which is not logged."""
    server.log.warning("listening on %s", ", ".join(str(sock) for sock in server.LISTENERS))


def _check_exposure(addresses: list[Any]) -> None:
    """Exit with code 3 if `refuse_open_server` refuses one of gunicorn's bind addresses."""
    from belay_server.configuration.exposure import refuse_open_server  # noqa: PLC0415

    hosts = [a[0] if isinstance(a, tuple) else str(a) for a in addresses]
    try:
        refuse_open_server(hosts, os.environ)
    except SettingsError as error:
        print(f"belay web: {error}", file=sys.stderr, flush=True)
        sys.exit(3)
