"""What a child process and a host have in common: connections, and their place below the parent."""

from __future__ import annotations

import os
from concurrent.futures import Executor, ThreadPoolExecutor

from belay_server.bus.cancel_flag import CancelFlags
from belay_server.bus.client import Keys, connect_redis
from belay_server.bus.event_log import EventLog
from belay_server.configuration.settings import Settings
from belay_server.db.postgres.connection import connect
from belay_server.db.postgres.reconnecting import ReconnectingConnection
from belay_server.doorbell import Doorbell
from belay_server.graphs.checkpoints.own_checkpointer import run_checkpointer
from belay_server.graphs.registry import GraphRegistry
from belay_server.graphs.store import run_store
from belay_server.services.runs.endings import Announcer
from belay_workers.execution.access import RunAccess
from belay_workers.execution.contained_logging import contain_log_handlers, keep_streams_open
from belay_workers.execution.event_writer import EventWriter
from belay_workers.slots import Kind, Slot, SlotTable
from belay_workers.supervision.processes import become_session_and_reaper, stop_when_parent_dies


class ExecutingProcess:
    """A process that executes runs. Make it in the forked process: it opens connections and starts
    threads."""

    def __init__(
        self,
        settings: Settings,
        graphs: GraphRegistry,
        slots: SlotTable,
        owner: str,
        *,
        kind: Kind,
        doorbell: Doorbell,
        access: RunAccess,
    ) -> None:
        self.settings = settings
        # Before it is a group of its own, by which the parent tells orphans from children.
        self.slots = slots
        self.slot: Slot = slots.take(kind)
        become_session_and_reaper()
        stop_when_parent_dies()
        keep_streams_open()
        contain_log_handlers()
        self._canary, _ = os.pipe2(os.O_CLOEXEC)
        self.slot.keeps_open(self._canary)
        # The processes that supervise runs must get the CPU also while runs use all of it.
        os.nice(settings.child_nice)
        self.graphs = graphs
        #: The graphs of runs that were left pending because this project lacks them.
        self.unknown_graphs: set[str] = set()
        #: What the leases of this process's runs name as their owner.
        self.owner = f"{owner}/{os.getpid()}"
        self.database = ReconnectingConnection(
            lambda: connect(settings.database_url, pgbouncer=settings.pgbouncer, name="belay child")
        )
        keys = Keys(settings.redis_prefix)
        client = connect_redis(settings)
        self.event_log = EventLog.of(settings, client, keys)
        self.event_writer = EventWriter(EventLog.of(settings, client, keys))
        self.announcer = Announcer(self.event_log, CancelFlags(client, keys), doorbell)
        #: The one thread on which checkpoints and items are stored, in order.
        self.database_thread: Executor = ThreadPoolExecutor(1, thread_name_prefix="belay-database")
        self.database_thread.submit(lambda: None).result()
        self.access = access
        self.store = run_store(self.database, self.database_thread, graphs)
        self.checkpointer = run_checkpointer(graphs.own_checkpointer)
