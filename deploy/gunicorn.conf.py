"""gunicorn -c deploy/gunicorn.conf.py "app.factory:create_app()"

gevent workers: one process holds thousands of open streams and waits. The patch comes first, before
anything that opens sockets or makes locks is imported.
"""

from gevent import monkey

monkey.patch_all()

import ctypes
import os
import signal
import sys

bind = os.environ.get("BELAY_BIND") or f"0.0.0.0:{os.environ.get('PORT', '2024')}"
workers = int(os.environ.get("WEB_CONCURRENCY", "1"))
worker_class = "gevent"
worker_connections = int(os.environ.get("BELAY_WEB_CONNECTIONS", "10000"))
# Open streams are closed at a restart, and clients resume them; they must not hold it up.
graceful_timeout = 2
timeout = 60
keepalive = 75
# Ours: errors only. Requests are the proxy's to log.
accesslog = None
loglevel = "warning"
forwarded_allow_ips = os.environ.get("FORWARDED_ALLOW_IPS", "127.0.0.1")


def post_fork(server, worker):
    """A worker dies with its master, also when that was killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def worker_exit(server, worker):
    """Close the connections while there is still an event loop to close them with."""
    application = getattr(worker, "wsgi", None)
    if application is not None:
        application.extensions["belay"].database.close()


def when_ready(server):
    server.log.warning("listening on %s", ", ".join(str(sock) for sock in server.LISTENERS))
