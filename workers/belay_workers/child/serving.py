"""The body of a child process: it executes the runs that it is given, one after the other."""

from __future__ import annotations

import gc
import logging
import signal
import socket

from celery import signals

from belay_server.doorbell import Doorbell
from belay_workers.application import Belay, load_graphs
from belay_workers.child import debugger
from belay_workers.child.process import Child
from belay_workers.execution.attempt import attempt_run
from belay_workers.execution.place import do_now
from belay_workers.execution.warm_up import warm_up
from belay_workers.pool.child_process import RunSource

log = logging.getLogger(__name__)

#: Signals for which Celery has set handlers in the parent, besides those that children ignore.
SIGNALS_OF_CELERY = (signal.SIGUSR1, signal.SIGUSR2)


def serve(app: Belay, connection: socket.socket) -> None:
    """Execute runs until there are no more, or until a run has left this process unusable. Raises
    SystemExit where a node does, and what an attempt did not expect."""
    runs = RunSource(connection)
    child = _make_child(app)
    while child.is_usable and (run_id := runs.next_run(has_work=child.has_work)) is not None:
        do_now(attempt_run(child, run_id))


def _make_child(app: Belay) -> Child:
    gc.freeze()
    for number in SIGNALS_OF_CELERY:
        signal.signal(number, signal.SIG_DFL)
    if app.settings.debug_port:
        debugger.listen(app.settings.debug_port)
    if not app.settings.preload_graphs:
        load_graphs(app)
    # For code of the project that sets something up in each process, as for Celery's own pool.
    signals.worker_process_init.send(sender=None)
    doorbell = Doorbell.of(app.settings, app.placement.shared_graphs)
    child = Child(
        app.settings, app.graphs, app.slots, app.owner, doorbell=doorbell, access=app.access
    )
    warm_up(child)
    return child
