"""The place of one run in a host: how it is executed and stopped there."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from belay_server.db.postgres.connection import Connection
from belay_server.db.run_claims import ClaimRequest, RunEnding
from belay_server.domain.runs import Claim, ClaimedRun
from belay_server.graphs.checkpoints.run_saver import RunSaver
from belay_server.runtime import logs
from belay_server.services.runs.endings import RunEnd
from belay_workers.execution.place import STORE_CALL_SECONDS, T
from belay_workers.host.event_loop import HostLoop
from belay_workers.host.gated_run import GatedRun, uninterrupted
from belay_workers.host.hosted_saver import HostedSaver
from belay_workers.slots import Kind, StopReason

if TYPE_CHECKING:
    from belay_workers.host.host import Host

log = logging.getLogger(__name__)

#: If more runs than this stop at once, their states are not read.
_MANY = 20
#: An event loop is behind with its work while its timers are late by more than this, in seconds.
_LATE_SECONDS = 0.02
#: How many turns of such a loop a run may take to stop, and how many seconds in all.
_TURNS = 50
_LONGEST_SECONDS = 8.0


class _Patience:
    """Limits for how long a run that was asked to stop is not frozen. An event loop that is behind
    with its work, as when it stops a thousand runs, may not have executed the run's steps yet."""

    def __init__(self, loop: HostLoop) -> None:
        self._loop = loop
        self._turns = loop.turns + _TURNS
        self._ends_at = loop.time() + _LONGEST_SECONDS

    def is_left(self, due: float) -> bool:
        """Return whether the run gets another grace period. `due` is the time of the event loop at
        which the one that has ended was due to end."""
        now = self._loop.time()
        is_late = now - due > _LATE_SECONDS
        return is_late and self._loop.turns < self._turns and now < self._ends_at


class HostedPlace:
    """The `Place` of one run. Make it, and use it, on the event loop's thread."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self.settings = host.settings
        self.graphs = host.graphs
        self.graph_ids = host.graph_ids()
        self.slots = host.slots
        self.slot = host.slots.take(Kind.HOSTED_RUN)
        self.owner = host.owner
        self.unknown_graphs = host.unknown_graphs
        self.access = host.access.of_one_run()
        self.store = host.store.of_place()
        self.checkpointer = host.checkpointer
        self.event_log = host.event_log
        self.event_writer = host.event_writer
        self.announcer = host.announcer
        self.database = host.database
        self.database_thread = host.database_thread
        self.reconnects = False
        self._run: GatedRun | None = None
        self._root: asyncio.Task[Any] | None = None
        #: Whether something of the run's graph may be executed.
        self._is_executing = False
        self._asked = StopReason.NONE
        self._is_stopping = False
        #: The runs of the host that had been stopped when this one began.
        self._stops_before = 0

    def release(self) -> None:
        """Give the slot back. Call it when the attempt is over."""
        if self._run is not None:
            self._run.leave_slot()
        if self._is_stopping:
            self._host.stopping -= 1
        self.slot.release()

    def log_about(self, fields: Mapping[str, Any] | None) -> None:
        """Add fields to the log records of the run. None ends that."""
        logs.about_run_here(fields)

    @property
    def asked(self) -> StopReason:
        """Return the stop that has taken effect on the graph, NONE if none has."""
        return self._asked

    @property
    def is_disturbed(self) -> bool:
        """Return whether another run of the host was stopped since this one began."""
        return self._host.stops > self._stops_before

    @property
    def is_hurried(self) -> bool:
        """Return whether many runs of the host stop at once."""
        return self._host.stopping > _MANY

    def asked_of(self, claim: Claim) -> StopReason:
        """Return the stop requested for this run, whether or not it has taken effect."""
        return self.slot.asked(claim)

    async def on_database(
        self, work: Callable[[Connection], T], *, keep_waiting: Callable[[], bool]
    ) -> T:
        """Do work on the host's connection, in order with that of its other runs."""
        call = partial(self.database.run, work, keep_waiting=keep_waiting)
        return await asyncio.get_running_loop().run_in_executor(self.database_thread, call)

    async def claim(
        self, request: ClaimRequest, alone: Callable[[Connection], ClaimedRun | None]
    ) -> ClaimedRun | None:
        """Claim a run, with others or alone. Waits for Postgres until the worker drains."""
        return await self._host.commits.do(
            self._host.claims,
            request,
            alone=alone,
            keep_waiting=lambda: not self.slots.draining,
        )

    async def end(
        self, ending: RunEnding, alone: Callable[[Connection], RunEnd | None]
    ) -> RunEnd | None:
        """Write the end of a run, with others or alone. Waits for Postgres until the lease is
        lost."""
        return await self._host.commits.do(
            self._host.ends,
            ending,
            alone=alone,
            keep_waiting=lambda: self.asked_of(ending.claim) is not StopReason.LEASE_LOST,
        )

    def saver(self, claim: Claim, **options: Any) -> RunSaver:
        """Return the saver of an attempt. `options` are those of `RunSaver`."""
        return HostedSaver(
            self._host.commits, self.database, claim, self.database_thread, **options
        )

    async def announce(self, end: RunEnd) -> None:
        """Announce an end, with others."""
        await self._host.announcements.announce(end)

    def uninterrupted(self, function: Callable[..., T], *args: Any) -> T:
        """Call a function of Belay's own from the code of a run: no stop raises within it."""
        return uninterrupted(function, *args)

    async def blocking(self, call: Callable[[], T]) -> T:
        """Do a call that waits, on a thread of Belay's own."""
        return await asyncio.get_running_loop().run_in_executor(self._host.helpers, call)

    async def run(self, claim: Claim, work: Coroutine[Any, Any, T]) -> T:
        """Execute a run's graph in a task of its own. After a stop, return only when nothing of the
        run is left."""
        run = self._run = GatedRun(claim, self.slot)
        self._asked = StopReason.NONE
        self._stops_before = self._host.stops
        root: asyncio.Task[T] = asyncio.get_running_loop().create_task(work, context=run.context)
        self._root, self._is_executing = root, True
        self.look_for_a_stop()
        try:
            await asyncio.wait({root})
            if self._asked is not StopReason.NONE:
                self._root = None
                await self._end_leftovers(run)
        finally:
            self._root, self._is_executing = None, False
            self._host.clean_up(run)
        return root.result()

    async def end_leftovers(self) -> None:
        """End what the graph of the run has left in the background, unless `run` has done so after
        a stop."""
        run = self._run
        if run is None or self._asked is not StopReason.NONE:
            return
        self.slot.stopping()
        self._is_executing = True
        self._freeze_later(run, _Patience(self._host.loop))
        try:
            await self._end_leftovers(run)
        finally:
            self._is_executing = False
            self._host.clean_up(run)

    async def _end_leftovers(self, run: GatedRun) -> None:
        self._host.stops += 1
        self._is_stopping = True
        self._host.stopping += 1
        await self._host.leftovers.end(run, self._calls_of_store())
        self.slot.finishing()  # from here on, the supervisor waits

    def _calls_of_store(self) -> Callable[[], bool]:
        """Return a function that returns whether calls of the project's store are left, and cancels
        those that take long."""
        cancel_at = time.monotonic() + STORE_CALL_SECONDS

        def are_left() -> bool:
            if self.store.has_calls_to_cancel and time.monotonic() >= cancel_at:
                self.store.cancel_calls()
            return self.store.has_calls_to_cancel

        return are_left

    async def finish(self, work: Coroutine[Any, Any, T]) -> T:
        """Execute a short coroutine of Belay's own, which is not stopped."""
        return await work

    def look_for_a_stop(self) -> None:
        """Cancel the run's task if a stop was requested; freeze the run if that has no effect."""
        run = self._run
        if run is None or self._root is None or self._asked is not StopReason.NONE:
            return
        self._asked = self.slot.asked(run.claim)
        if self._asked is StopReason.NONE:
            return
        run.cancel(self._root)
        self._freeze_later(run, _Patience(self._host.loop))

    def _freeze_later(self, run: GatedRun, patience: _Patience) -> None:
        due = self._host.loop.time() + self.settings.cancel_grace_ms / 1000
        self._host.loop.call_at(due, self._freeze, run, due, patience)

    def _freeze(self, run: GatedRun, due: float, patience: _Patience) -> None:
        """Freeze a run that goes on, unless the event loop is behind with its work."""
        if not self._is_executing:
            return
        if patience.is_left(due):
            self._freeze_later(run, patience)
            return
        run_id = str(run.claim.run_id)
        log.warning(
            "run %s goes on although it was asked to stop; freezing it",
            run_id,
            extra={"run_id": run_id},
        )
        run.freeze()
