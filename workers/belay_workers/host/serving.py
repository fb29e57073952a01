"""The body of a host process: it executes the runs that it is given, many at once."""

from __future__ import annotations

import gc
import signal
import socket

from celery import signals

from belay_server.doorbell import Doorbell
from belay_workers.application import Belay, load_graphs
from belay_workers.child.serving import SIGNALS_OF_CELERY
from belay_workers.execution.warm_up import prepare_connections, run_a_graph
from belay_workers.host.host import Host


def serve(app: Belay, connection: socket.socket) -> None:
    """Execute runs until the parent closes the connection."""
    gc.freeze()
    for number in SIGNALS_OF_CELERY:
        signal.signal(number, signal.SIG_DFL)
    if not app.settings.preload_graphs:
        load_graphs(app)
    signals.worker_process_init.send(sender=None)
    host = Host(
        app.settings,
        app.graphs,
        app.slots,
        app.owner,
        graph_ids=app.placement.shared_graphs,
        doorbell=Doorbell.of(app.settings, app.placement.shared_graphs),
        access=app.access,
    )
    host.database_thread.submit(prepare_connections, host).result()
    host.loop.run_until_complete(run_a_graph())
    host.serve(connection)
