"""gunicorn -c python:belay_server.gunicorn_conf "belay_server.factory:create_app()"

gevent workers: one process holds thousands of open streams and waits. The patch comes first, before
anything that opens sockets or makes locks is imported.
"""

import gevent
from gevent import monkey

monkey.patch_all()

import atexit
import ctypes
import os
import shutil
import signal
import sys
import tempfile


def _remove_if_master(folder, master):
    """A forked worker inherits what is to be done at the exit, and must not do it."""
    if os.getpid() == master:
        shutil.rmtree(folder, ignore_errors=True)


bind = os.environ.get("BELAY_BIND") or f"0.0.0.0:{os.environ.get('PORT', '2024')}"
workers = int(os.environ.get("WEB_CONCURRENCY", "1"))
worker_class = "gevent"
worker_connections = int(os.environ.get("BELAY_WEB_CONNECTIONS", "10000"))
# Open streams are closed at a restart, and clients resume them; they must not hold it up.
graceful_timeout = 2
timeout = 60
# Also how long the headers of a request may take.
keepalive = int(os.environ.get("BELAY_HEADER_SECONDS", "75"))
# Ours: errors only. Requests are the proxy's to log.
accesslog = None
loglevel = "warning"

if workers > 1 and "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
    # A scrape meets one of them and is told what all have counted: they share files.
    metrics_folder = tempfile.mkdtemp(prefix="belay-metrics-")
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = metrics_folder
    atexit.register(_remove_if_master, metrics_folder, os.getpid())

# No header of a client's says where this application is mounted.
forwarder_headers = ""
forwarded_allow_ips = os.environ.get("FORWARDED_ALLOW_IPS", "127.0.0.1")


def post_fork(server, worker):
    """A worker dies with its master, also when that was killed."""
    from belay_server import startup_gc  # noqa: F401, PLC0415  (what it loads now, it keeps)

    if sys.platform == "linux":
        from belay_server import allocator  # noqa: PLC0415

        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
        allocator.return_large_blocks()


def post_worker_init(worker):
    from belay_server import startup_gc  # noqa: PLC0415

    startup_gc.started()


def pre_request(worker, req):
    """Yield to other connections. One with its next request in the socket's buffer (pipelining)
    would otherwise be served without interruption for as long as it sends."""
    gevent.sleep(0)


def worker_exit(server, worker):
    """Close the connections while there is still an event loop to close them with."""
    application = getattr(worker, "wsgi", None)
    if application is not None:
        application.extensions["belay"].close()


def child_exit(server, worker):
    """What the process that has ended counted stays; what it had open is gone."""
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        from prometheus_client.multiprocess import mark_process_dead  # noqa: PLC0415

        mark_process_dead(worker.pid)


def on_starting(server):
    """The log of gunicorn itself looks like ours."""
    from belay_server.logs import (  # noqa: PLC0415
        formatter,
        without_failed_boots,
        without_request_lines,
    )

    server.log.error_log.addFilter(without_request_lines)
    server.log.error_log.addFilter(without_failed_boots)
    for handler in server.log.error_log.handlers:
        if os.environ.get("BELAY_LOG_FORMAT", "").strip().lower() == "json":
            handler.setFormatter(formatter("json"))
    _refuse_to_be_open(server.cfg.address)


def when_ready(server):
    server.log.warning("listening on %s", ", ".join(str(sock) for sock in server.LISTENERS))


def _refuse_to_be_open(addresses):
    """Addresses as gunicorn has them: of the command line, if it names any, else of this file."""
    from belay_server.exposure import refuse_open_server  # noqa: PLC0415
    from belay_server.settings import SettingsError  # noqa: PLC0415

    hosts = [a[0] if isinstance(a, tuple) else str(a) for a in addresses]
    try:
        refuse_open_server(hosts, os.environ)
    except SettingsError as error:
        print(f"belay web: {error}", file=sys.stderr, flush=True)
        sys.exit(3)
