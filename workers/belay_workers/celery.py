"""The Celery app: `celery -A belay_workers.celery worker`.

The worker's parent process loads the graphs before the pool forks, so children start warm. It then
starts the supervisor, the sweeper and the other background threads. Each child process builds its
`Child` after the fork. The app is the only global.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import sys
import uuid
import warnings
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn

import psycopg
from billiard.util import get_logger as billiard_logger
from celery import Celery, bootsteps, signals
from celery.app.amqp import AMQP
from celery.platforms import SecurityWarning
from kombu import Connection

from belay_server import logs, startup_gc
from belay_server.bus.cancel_flag import CancelFlags
from belay_server.bus.client import Keys, connect_redis
from belay_server.bus.event_log import EventLog
from belay_server.db.connection import connect, fetch_value
from belay_server.db.migrate import SchemaNotReady, wait_for_schema
from belay_server.db.outages import is_outage
from belay_server.doorbell import PING_TASK, Doorbell, celery_config
from belay_server.graphs.project.langgraph_json import read_project
from belay_server.graphs.project.loading import ProjectError
from belay_server.graphs.registry import GraphRegistry
from belay_server.services.assistant_cache import AssistantCache
from belay_server.services.parts import RunParts
from belay_server.services.runs.cancellation import announcer
from belay_server.settings import Settings, SettingsError
from belay_workers.background.liveness import Liveness
from belay_workers.background.sweeper import Sweeper
from belay_workers.background.webhooks import Webhooks
from belay_workers.child.process import Child
from belay_workers.child.signals import ChildSignals
from belay_workers.child.warm_up import warm_up
from belay_workers.slots import SlotTable
from belay_workers.supervision import processes
from belay_workers.supervision.fork_lock import never_while_forking
from belay_workers.supervision.guardian import Guardian
from belay_workers.supervision.orphans import Orphans
from belay_workers.supervision.supervisor import Supervisor

if TYPE_CHECKING:
    from belay_workers.background.metrics import WorkerMetrics

log = logging.getLogger(__name__)

#: Slots beyond twice the pool's size: a dead child's slot is freed only after it has been read.
_SPARE_SLOTS = 64
#: Postgres connections of the parent's own threads, besides one per child.
_OWN_CONNECTIONS = 4
#: The connections that Postgres reserves for superusers are subtracted.
_ALLOWED_CONNECTIONS = """
SELECT current_setting('max_connections')::int
     - current_setting('superuser_reserved_connections')::int
"""
_SCHEMA_WAIT_SECONDS = 60.0
#: Seconds between two checks, in the main loop, that the guardian is alive.
_GUARD_SECONDS = 1.0
#: Exit code of a worker that has stopped consuming and is to be restarted.
_STALLED = 75


class PromptConnection(Connection):
    """A consumer's connection that is re-established soon after the broker is available again.

    By default Celery waits up to half a minute between two tries. It also ends the worker when
    Redis refuses a command (because it is full, or has become a replica) without closing the
    connection.
    """

    @property
    def connection_errors(self) -> tuple[type[Exception], ...]:
        return (*super().connection_errors, *super().channel_errors)

    def ensure_connection(self, *args: Any, **kwargs: Any) -> Any:
        prompt = {"interval_start": 0.2, "interval_step": 0.2, "interval_max": 2.0}
        return super().ensure_connection(*args, **{**kwargs, **prompt})  # type: ignore[no-untyped-call]


class PromptAMQP(AMQP):
    Connection = PromptConnection

    def TaskConsumer(self, *args: Any, **kwargs: Any) -> Any:  # noqa: N802  (Celery's name)
        """Consume without acknowledgements if the broker is Redis.

        The sweeper rings a lost doorbell again, and tracking unacknowledged messages in Redis costs
        two round trips each. Other brokers need acknowledgements to limit what they send.
        """
        if self.app.conf.broker_url.startswith("redis"):
            kwargs["no_ack"] = True
        return super().TaskConsumer(*args, **kwargs)


class Belay(Celery):
    """A Celery app with the objects that the parts of its worker share."""

    amqp_cls = PromptAMQP
    settings: Settings
    graphs: GraphRegistry
    slots: SlotTable
    owner: str
    guardian: Guardian
    orphans: Orphans
    #: None when Postgres was unavailable at the start.
    allowed_connections: int | None = None
    child: Child | None = None


def _refuse_to_start(error: Exception) -> NoReturn:
    """Print the error on one line and exit with 3, the code for "a restart does not help"."""
    print(f"belay worker: {error}", file=sys.stderr, flush=True)
    sys.exit(3)


def _make_app() -> Belay:
    try:
        settings = Settings.from_environ(os.environ)
        project = read_project(settings.config_path)
    except (SettingsError, ProjectError) as error:
        _refuse_to_start(error)
    made = Belay("belay", include=["belay_workers.tasks"])
    made.conf.update(celery_config(settings))
    made.conf.worker_concurrency = settings.concurrency
    made.conf.worker_pool = "belay_workers.pool:ChildTaskPool"
    made.settings = settings
    made.graphs = GraphRegistry(project)
    made.owner = f"{socket.gethostname()}/{uuid.uuid4().hex[:8]}"
    return made


app = _make_app()
# Celery warns about running as root because of pickle; messages here are JSON with one run id.
warnings.filterwarnings("ignore", category=SecurityWarning)


def _load_graphs() -> None:
    try:
        app.graphs = GraphRegistry.load(app.graphs.project)
    except ProjectError as error:
        _refuse_to_start(error)


@signals.setup_logging.connect
def _configure_logging(loglevel: Any = None, **_: Any) -> None:
    """Log Celery's records and Belay's to standard error, in the same format."""
    logs.configure(app.settings, loglevel if isinstance(loglevel, int) else logging.INFO)
    # The supervisor kills children on purpose and logs the reason; Celery's tracebacks of lost
    # messages add no information.
    logging.getLogger("celery.worker.request").setLevel(logging.CRITICAL)
    logging.getLogger("celery.app.trace").setLevel(logging.ERROR)
    logging.getLogger("celery.worker.strategy").setLevel(logging.WARNING)
    # By default the pool's logger does not propagate its records to the root logger.
    pool_logger = billiard_logger()
    pool_logger.setLevel(logging.ERROR)
    pool_logger.propagate = True


@signals.worker_init.connect
def _prepare_parent(sender: Any = None, **_: Any) -> None:
    """Before the pool forks: wait for the schema, load the graphs, make the shared memory.

    What was loaded is then excluded from garbage collection.
    """
    settings = app.settings
    try:
        wait_for_schema(
            settings.database_url,
            seconds=_SCHEMA_WAIT_SECONDS,
            vectors=app.graphs.project.store.index is not None,
        )
    except SchemaNotReady as error:
        _refuse_to_start(error)
    concurrency = sender.concurrency or settings.concurrency
    _refuse_too_many_connections(concurrency)
    app.slots = SlotTable(concurrency * 2 + _SPARE_SLOTS)
    # Processes that a node starts can be found when the node's child dies, and when this one does.
    ChildSignals()
    processes.become_reaper()
    app.guardian = Guardian(app.slots)
    app.guardian.ensure()  # fork it while this process is small
    if settings.preload_graphs:
        _load_graphs()
    app.orphans = Orphans(app.slots.pids)
    startup_gc.started()


def _keep_guarded() -> None:
    """Restart the guardian if it has ended. Runs on the main thread, which also forks the pool."""
    if app.guardian.ensure() and app.guardian.pid is not None:
        app.orphans.keep(app.guardian.pid)


def _refuse_too_many_connections(concurrency: int) -> None:
    """Exit if Postgres allows fewer connections than the worker needs.

    The children would otherwise take all connections, and none would be left to renew leases or to
    read cancels with. There is no check behind PgBouncer, or while Postgres is unavailable.
    """
    needed = concurrency + _OWN_CONNECTIONS
    limit = app.allowed_connections = _allowed_connections()
    if limit is not None and needed > limit and not app.settings.pgbouncer:
        _refuse_to_start(
            SettingsError(
                f"{concurrency} runs at once need {needed} connections to Postgres, which allows "
                f"{limit}: raise its max_connections, or lower BELAY_CONCURRENCY"
            )
        )


def _log_connections(concurrency: int) -> None:
    """Log at the start how many connections the worker uses and how many Postgres allows."""
    limit = app.allowed_connections
    log.info(
        "this worker is %s; it uses up to %d connections to Postgres (%d children, %d of its own), "
        "each web process up to %d; the server allows %s",
        app.owner,
        concurrency + _OWN_CONNECTIONS,
        concurrency,
        _OWN_CONNECTIONS,
        app.settings.web_pool_size,
        "an unknown number" if limit is None else limit,
    )


def _allowed_connections() -> int | None:
    """Return how many connections Postgres allows; None while it is unavailable."""
    try:
        with connect(app.settings.database_url, name="belay start") as conn:
            return int(fetch_value(conn, _ALLOWED_CONNECTIONS, {}))
    except psycopg.Error as error:
        if not is_outage(error):
            raise
        log.warning(
            "cannot read Postgres's connection limit; starting without the check: %s", error
        )
        return None


@signals.worker_process_init.connect
def _prepare_child(**_: Any) -> None:
    gc.freeze()
    if not app.settings.preload_graphs:
        _load_graphs()
    doorbell = Doorbell.of(app.settings)
    app.child = Child(app.settings, app.graphs, app.slots, app.owner, doorbell)
    warm_up(app.child)


@signals.worker_shutting_down.connect
def _take_no_more(**_: Any) -> None:
    """Claim no more runs, from the first SIGTERM on, before Celery closes anything."""
    app.slots.start_draining()


class SupervisorStep(bootsteps.StartStopStep):
    """Starts the background threads after the pool has forked; stops them before it is joined.

    They are the supervisor, the sweeper, webhooks, the liveness check and the metrics.
    """

    requires = ("celery.worker.components:Pool",)

    def __init__(self, worker: Any, **kwargs: Any) -> None:
        super().__init__(worker, **kwargs)
        self._supervisor: Supervisor | None = None
        self._sweeper: Sweeper | None = None
        self._webhooks: Webhooks | None = None
        self._liveness: Liveness | None = None
        self._metrics: WorkerMetrics | None = None
        self._deaths_read, self._deaths_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def start(self, worker: Any) -> None:
        # Handle Ctrl-C like SIGTERM, exit code included; Celery's own exit code is a failure.
        signal.signal(signal.SIGINT, signal.getsignal(signal.SIGTERM))
        settings = app.settings
        _log_connections(worker.concurrency)
        keys = Keys(settings.redis_prefix)
        client = connect_redis(settings)
        event_log = EventLog(
            client,
            keys,
            ttl_seconds=settings.event_log_ttl_seconds,
            max_events=settings.event_log_max_events,
            max_bytes=settings.event_log_max_bytes,
        )
        doorbell = Doorbell.of(settings, turn=never_while_forking())
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
            on_death=self._tell_pool_of_death,
        )
        self._supervisor.start()
        self._sweeper = Sweeper(parts, app.owner, app.slots.counters)
        self._sweeper.start()
        headers = dict(app.graphs.project.webhook_headers)
        self._webhooks = Webhooks(settings, parts.webhook_policy, headers)
        self._webhooks.start()
        self._watch_liveness(doorbell)
        if settings.worker_metrics_port:
            from belay_workers.background.metrics import WorkerMetrics  # noqa: PLC0415  (most workers serve none)

            self._metrics = WorkerMetrics(app.slots, settings.worker_metrics_port)
            self._metrics.start()

    def _watch_liveness(self, doorbell: Doorbell) -> None:
        seconds = app.settings.liveness_seconds
        if not seconds:
            return
        liveness = self._liveness = Liveness(
            doorbell, app.slots, app.owner, seconds=seconds, on_stall=self._end_stalled
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

    def _tell_pool_of_death(self) -> None:
        with suppress(BlockingIOError):
            os.write(self._deaths_write, b"!")

    def register_with_event_loop(self, worker: Any, hub: Any) -> None:
        """Have Celery replace a dead child immediately.

        Celery's own notification, a closed pipe, arrives before the child can be waited for. When
        Celery checks too early it finds no dead child, and checks again only after five seconds.
        The supervisor's notification arrives once the child is dead.
        """

        def replace_the_dead() -> None:
            with suppress(BlockingIOError):
                os.read(self._deaths_read, 4096)
            worker.pool.maintain_pool()

        hub.add_reader(self._deaths_read, replace_the_dead)
        hub.call_repeatedly(_GUARD_SECONDS, _keep_guarded)
        # If a child died while the first connection to the broker was being made, Celery would
        # conclude that the pool cannot start.
        worker.pool.maintain_pool()

    def stop(self, _worker: Any) -> None:
        if self._liveness is not None:
            self._liveness.stop()
        if self._sweeper is not None:
            self._sweeper.stop()
        if self._webhooks is not None:
            self._webhooks.stop()
        if self._supervisor is not None:
            # The drain ends the children by a signal; the pool's errors about it are expected.
            billiard_logger().setLevel(logging.CRITICAL)
            self._supervisor.drain()
            app.guardian.stop()
        if self._metrics is not None:
            self._metrics.stop()

    terminate = stop


app.steps["worker"].add(SupervisorStep)
