"""A worker's parent process: what it prepares before the pool forks, and its background threads."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from celery import bootsteps, signals

from belay_server.bus.cancel_flag import CancelFlags
from belay_server.bus.client import Keys, connect_redis
from belay_server.bus.event_log import EventLog
from belay_server.bus.isolated_graphs import IsolatedGraphs
from belay_server.db.migrate import SchemaNotReady, wait_for_schema
from belay_server.doorbell import PING_TASK, Doorbell
from belay_server.runtime import startup_gc
from belay_server.services.assistant_cache import AssistantCache
from belay_server.services.parts import RunParts
from belay_server.services.runs.cancellation import announcer
from belay_server.services.webhooks.calls import CallSettings
from belay_workers.application import Belay, load_graphs, refuse_to_start
from belay_workers.background.isolation_reports import IsolationReports
from belay_workers.background.liveness import Liveness
from belay_workers.background.sweeper import Sweeper
from belay_workers.background.webhooks import Webhooks
from belay_workers.child.signals import ChildSignals
from belay_workers.connection_budget import log_connections, refuse_too_many_connections
from belay_workers.host.replaceable_functions import make_replaceable
from belay_workers.placement import Placement, most_hosts
from belay_workers.slots import SlotTable
from belay_workers.supervision import processes
from belay_workers.supervision.guardian import Guardian
from belay_workers.supervision.orphans import Orphans
from belay_workers.supervision.supervisor import Supervisor

if TYPE_CHECKING:
    from belay_workers.background.metrics import WorkerMetrics
    from belay_workers.pool.run_pool import RunPool

#: Slots beyond twice the pool's size: a dead child's slot is freed only after it has been read.
_SPARE_SLOTS = 64
_SCHEMA_WAIT_SECONDS = 60.0
#: Seconds between two checks, in the main loop, that the guardian is alive.
_GUARD_SECONDS = 1.0
#: For how long a parent is waited for, which may be slow, even if its leases lapse earlier.
_UNSUPERVISED_SECONDS = 5.0
#: Exit code of a worker that has stopped consuming and is to be restarted.
_STALLED = 75


def prepare(app: Belay, concurrency: int) -> int:
    """Before the pool forks: wait for the schema, load the graphs, make the shared memory.

    What was loaded is then excluded from garbage collection. Return how many runs the worker
    executes at once: `concurrency`, which is Celery's option or the default, and then without the
    part for hosts where no graph shares them.
    """
    settings = app.settings
    try:
        wait_for_schema(
            settings.database_url,
            seconds=_SCHEMA_WAIT_SECONDS,
            vectors=app.graphs.project.store.index is not None,
        )
    except SchemaNotReady as error:
        refuse_to_start(error)
    app.slots = SlotTable((concurrency + most_hosts(settings)) * 2 + _SPARE_SLOTS)
    # Processes that a node starts can be found when the node's child dies, and when this one does.
    app.child_signals = ChildSignals()
    processes.become_reaper()
    # A lease may have been renewed one interval ago when the parent stops.
    until_taken = settings.lease_seconds - settings.lease_renewal_seconds - _GUARD_SECONDS
    app.guardian = Guardian(app.slots, unsupervised_seconds=max(until_taken, _UNSUPERVISED_SECONDS))
    app.guardian.ensure()
    make_replaceable()  # before the project can import them by name
    if settings.preload_graphs:
        load_graphs(app)
    app.placement = Placement(settings, app.graphs)
    if concurrency == app.conf.worker_concurrency:
        concurrency = settings.concurrency + app.placement.hosted_runs
    refuse_too_many_connections(app, concurrency)
    app.orphans = Orphans(app.slots.pids)
    _import_for_children()
    startup_gc.started()
    return concurrency


def _import_for_children() -> None:
    """Import before the fork what every child would otherwise import at its start.

    LangChain imports tracers at a first run.
    """
    import langchain_core.tracers.context  # noqa: PLC0415
    import langchain_core.tracers.run_collector  # noqa: PLC0415
    import langchain_core.tracers.stdout  # noqa: F401, PLC0415


def _keep_guarded(app: Belay) -> None:
    """Restart the guardian if it has ended. Runs on the main thread."""
    if app.guardian.ensure() and app.guardian.pid is not None:
        app.orphans.keep(app.guardian.pid)


class BackgroundStep(bootsteps.StartStopStep):
    """Starts the background threads after the pool; stops them before it.

    They are the supervisor, the sweeper, webhooks, the liveness check and the metrics.
    """

    requires = ("celery.worker.components:Pool",)

    def __init__(self, worker: Any, **kwargs: Any) -> None:
        super().__init__(worker, **kwargs)
        self._app: Belay = worker.app
        self._pool: RunPool
        self._supervisor: Supervisor | None = None
        self._sweeper: Sweeper | None = None
        self._webhooks: Webhooks | None = None
        self._liveness: Liveness | None = None
        self._metrics: WorkerMetrics | None = None
        self._isolation: IsolationReports | None = None
        self._deaths_read, self._deaths_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def start(self, worker: Any) -> None:
        # Handle Ctrl-C like SIGTERM, exit code included; Celery's own exit code is a failure.
        signal.signal(signal.SIGINT, signal.getsignal(signal.SIGTERM))
        self._pool = worker.pool
        app, settings = self._app, self._app.settings
        log_connections(app, worker.concurrency)
        keys = Keys(settings.redis_prefix)
        client = connect_redis(settings)
        event_log = EventLog.of(settings, client, keys)
        doorbell = Doorbell.of(settings, app.placement.shared_graphs)
        parts = RunParts(
            settings=settings,
            graphs=app.graphs,
            doorbell=doorbell,
            cancel_flags=CancelFlags(client, keys),
            event_log=event_log,
            assistant_cache=AssistantCache(),
            count_unstarted=app.slots.counters.ended_unstarted,
        )
        self._supervisor = Supervisor(
            settings,
            app.slots,
            app.owner,
            announcer(parts),
            orphans=app.orphans,
            on_death=self._notify_pool,
            isolate=app.isolate,
        )
        self._supervisor.start()
        self._sweeper = Sweeper(parts, app.owner, app.slots.counters)
        self._sweeper.start()
        of_project = app.graphs.project.webhooks
        calls = CallSettings(
            parts.webhook_policy,
            app.graphs.project.url_in(settings.internal_url),
            secret=settings.webhook_secret,
            headers=of_project.headers,
            fields=of_project.fields,
        )
        self._webhooks = Webhooks(settings, calls)
        self._webhooks.start()
        if app.placement.shared_graphs:
            graphs = IsolatedGraphs(client, keys)
            self._isolation = IsolationReports(graphs, app.owner, app.isolation_reasons)
            self._isolation.start()
        self._watch_liveness(doorbell)
        if settings.worker_metrics_port:
            from belay_workers.background.metrics import WorkerMetrics  # noqa: PLC0415  (most workers serve none)

            self._metrics = WorkerMetrics(app.slots, settings.worker_metrics_port)
            self._metrics.start()

    def _watch_liveness(self, doorbell: Doorbell) -> None:
        app = self._app
        seconds = app.settings.liveness_seconds
        if not seconds:
            return
        liveness = self._liveness = Liveness(
            doorbell,
            app.owner,
            seconds=seconds,
            takes_messages=lambda: self._pool.takes(hosted=False),
            on_stall=self._end_stalled,
        )
        liveness.consume_with(app)

        @signals.task_received.connect(weak=False)
        def note(request: Any = None, **_: Any) -> None:
            if request.name == PING_TASK:
                liveness.received(request.id)

        liveness.start()

    def _end_stalled(self) -> None:
        """Put the running runs back and exit. The main loop is not involved: it may be hung."""
        self.stop(None)
        os._exit(_STALLED)

    def _notify_pool(self) -> None:
        with suppress(BlockingIOError):
            os.write(self._deaths_write, b"!")

    def register_with_event_loop(self, worker: Any, hub: Any) -> None:
        """Have the pool replace a dead child as soon as the supervisor has freed its slot."""

        def replace_the_dead() -> None:
            with suppress(BlockingIOError):
                os.read(self._deaths_read, 4096)
            worker.pool.maintain_pool()

        hub.add_reader(self._deaths_read, replace_the_dead)
        hub.call_repeatedly(_GUARD_SECONDS, _keep_guarded, self._app)

    def stop(self, _worker: Any) -> None:
        if self._liveness is not None:
            self._liveness.stop()
        if self._sweeper is not None:
            self._sweeper.stop()
        if self._webhooks is not None:
            self._webhooks.stop()
        if self._supervisor is not None:
            self._supervisor.drain()
            self._pool.end_children()  # a child may have started meanwhile
            self._app.guardian.stop()
        if self._metrics is not None:
            self._metrics.stop()
        if self._isolation is not None:
            self._isolation.stop()

    terminate = stop
