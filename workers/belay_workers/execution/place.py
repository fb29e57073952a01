"""Define what an attempt needs of the place in which it executes its run.

The steps of an attempt (`attempt.py`) are written once, as coroutines. In a child process, which
has one run at a time, what they await is done at once, on the main thread (`do_now`).
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Executor
from typing import Any, Protocol, TypeVar

from belay_server.bus.event_log import EventLog
from belay_server.configuration.settings import Settings
from belay_server.db.postgres.connection import Connection
from belay_server.db.postgres.reconnecting import ReconnectingConnection
from belay_server.db.run_claims import ClaimRequest, RunEnding
from belay_server.domain.runs import Claim, ClaimedRun
from belay_server.graphs.checkpoints.own_checkpointer import OwnCheckpointer
from belay_server.graphs.checkpoints.run_saver import RunSaver
from belay_server.graphs.registry import GraphRegistry
from belay_server.graphs.store import GraphStore
from belay_server.services.runs.endings import Announcer, RunEnd
from belay_workers.execution.access import RunAccess
from belay_workers.execution.event_writer import EventWriter
from belay_workers.slots import Slot, SlotTable, StopReason

T = TypeVar("T")


#: Seconds that a call of the project's own store may take after a stop of its run.
STORE_CALL_SECONDS = 0.1


class Place(Protocol):
    """The place of one attempt: a child process, or a part of a host."""

    settings: Settings
    graphs: GraphRegistry
    #: The graphs whose runs may be claimed here.
    graph_ids: list[str]
    slots: SlotTable
    slot: Slot
    #: What the leases of this place's runs name as their owner.
    owner: str
    #: The graphs of runs that were left pending because this project lacks them.
    unknown_graphs: set[str]
    access: RunAccess
    store: GraphStore
    #: The project's own, None without one.
    checkpointer: OwnCheckpointer | None
    event_log: EventLog
    event_writer: EventWriter
    announcer: Announcer
    #: The connection, and the one thread on which the graph's checkpoints and items are stored.
    database: ReconnectingConnection
    database_thread: Executor
    #: Whether to close the connection after the next end: Postgres's process has grown.
    reconnects: bool

    def log_about(self, fields: Mapping[str, Any] | None) -> None:
        """Add fields to the log records of the run. None ends that."""

    @property
    def asked(self) -> StopReason:
        """The stop of the current run that has taken effect on its graph, NONE if none has."""

    def asked_of(self, claim: Claim) -> StopReason:
        """Return the stop requested for this run, whether or not it has taken effect."""

    @property
    def is_disturbed(self) -> bool:
        """Whether a neighbour was stopped while the current run was executed. That may have
        cancelled what both had waited for."""

    @property
    def is_hurried(self) -> bool:
        """Whether so many runs stop at once that their states are left to be read on demand."""

    async def on_database(
        self, work: Callable[[Connection], T], *, keep_waiting: Callable[[], bool]
    ) -> T:
        """Do work on the connection, as `ReconnectingConnection.run`."""

    async def claim(
        self, request: ClaimRequest, alone: Callable[[Connection], ClaimedRun | None]
    ) -> ClaimedRun | None:
        """Claim a run, with others or `alone`. Waits for Postgres until the worker drains."""

    async def end(
        self, ending: RunEnding, alone: Callable[[Connection], RunEnd | None]
    ) -> RunEnd | None:
        """Write the end of a run, with others or `alone`. Waits for Postgres until the lease is
        lost."""

    def saver(self, claim: Claim, **options: Any) -> RunSaver:
        """Return the saver of an attempt. `options` are those of `RunSaver`."""

    async def announce(self, end: RunEnd) -> None:
        """Announce an end."""

    def uninterrupted(self, function: Callable[..., T], *args: Any) -> T:
        """Call a function of Belay's own from the code of a run: no stop raises within it."""

    async def blocking(self, call: Callable[[], T]) -> T:
        """Do a call that waits for Redis, the broker or another thread."""

    async def run(self, claim: Claim, work: Coroutine[Any, Any, T]) -> T:
        """Execute a run's graph. After a stop, return only when nothing of the run is left."""

    async def end_leftovers(self) -> None:
        """End what the graph of the last run has left in the background, unless `run` has done so
        after a stop. The supervisor kills the process if that takes too long."""

    async def finish(self, work: Coroutine[Any, Any, T]) -> T:
        """Execute a short coroutine of Belay's own, which is not stopped."""


def do_now(steps: Coroutine[Any, Any, T]) -> T:
    """Return the result of a coroutine that awaits nothing but what is done at once."""
    try:
        steps.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    steps.close()
    raise RuntimeError("a step of an attempt waits, in a place where nothing would go on meanwhile")
