"""A child process: what it keeps between runs, and how it executes and stops one.

Its parts are made after the fork. The main thread serves synchronous nodes; the
event loop runs in a side thread, and database writes in another, in order.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
import traceback
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from types import FrameType
from typing import Any

import psutil

from belay_server.configuration.settings import Settings
from belay_server.db.postgres.connection import Connection
from belay_server.db.run_claims import ClaimRequest, RunEnding
from belay_server.domain.runs import Claim, ClaimedRun
from belay_server.doorbell import Doorbell
from belay_server.graphs.checkpoints.run_saver import RunSaver
from belay_server.graphs.registry import GraphRegistry
from belay_server.runtime import logs
from belay_server.services.runs.endings import RunEnd
from belay_workers.child.event_loop import RUN, RunOnLoop, new_loop
from belay_workers.child.forkserver import Forkserver
from belay_workers.child.leftovers import Leftovers
from belay_workers.child.limits import NodeLimits
from belay_workers.child.loop_leftovers import LoopLeftovers
from belay_workers.child.main_thread_executor import MainThreadExecutor
from belay_workers.child.signals import NodeSignals
from belay_workers.execution.access import RunAccess
from belay_workers.execution.executing_process import ExecutingProcess
from belay_workers.execution.place import T
from belay_workers.execution.project_code import ProjectCode
from belay_workers.execution.stops import ASK_SIGNAL, is_importing
from belay_workers.execution.thread_futures import attribute_callbacks
from belay_workers.slots import Kind, SlotTable, StopReason
from belay_workers.supervision.processes import (
    descendants,
    end_children,
    kill_with_descendants,
)

log = logging.getLogger(__name__)

_LEFTOVER_SECONDS = 0.05


class Child(ExecutingProcess):
    """A child process, which has one run at a time: the `Place` of all of its runs."""

    def __init__(
        self,
        settings: Settings,
        graphs: GraphRegistry,
        slots: SlotTable,
        owner: str,
        *,
        doorbell: Doorbell,
        access: RunAccess,
    ) -> None:
        super().__init__(
            settings, graphs, slots, owner, kind=Kind.CHILD, doorbell=doorbell, access=access
        )
        #: The graphs whose runs it may claim.
        self.graph_ids = graphs.graph_ids
        #: Whether to close the connection after the next end: Postgres's process has grown.
        self.reconnects = False
        self._claim: Claim | None = None
        self._task: asyncio.Task[Any] | None = None
        self._asked = StopReason.NONE
        signal.signal(ASK_SIGNAL, self._on_ask)
        self._signals: NodeSignals | None = None
        self._limits = NodeLimits()
        self._has_its_limits = True
        self._has_cut_an_import = False
        self._nodes = MainThreadExecutor(self._restore)
        self._project_code = ProjectCode(graphs.has_code)
        self._loop = new_loop(self._project_code)
        self._loop.set_default_executor(self._nodes)
        threading.Thread(target=self._run_loop, name="belay-loop", daemon=True).start()
        attribute_callbacks(self._project_code, RUN.get, _call_back)
        self._leftovers = Leftovers(set(threading.enumerate()), self._project_code)
        self._loop_leftovers = LoopLeftovers(self._loop, self._project_code)
        self._forkserver = Forkserver()
        self._processes_of_our_own = set(descendants(os.getpid()))
        #: Also those that earlier runs have left and that may stay.
        self._processes_before = self._processes_of_our_own

    @property
    def is_disturbed(self) -> bool:
        """Return False: a run in a process of its own has no neighbours."""
        return False

    @property
    def is_hurried(self) -> bool:
        """Return False: one run is executed at a time."""
        return False

    def asked_of(self, claim: Claim) -> StopReason:
        """Return the stop requested for this run, whether or not its signal has been handled."""
        return self.slot.asked(claim)

    @property
    def asked(self) -> StopReason:
        """Return why a stop of the current run was requested, NONE if none was."""
        return self._asked

    def log_about(self, fields: Mapping[str, Any] | None) -> None:
        """Add the run's fields to the log records of this process. None ends that."""
        logs.about_run(fields)

    async def on_database(
        self, work: Callable[[Connection], T], *, keep_waiting: Callable[[], bool]
    ) -> T:
        """Do work on the connection, as `ReconnectingConnection.run`."""
        return self.database.run(work, keep_waiting=keep_waiting)

    async def claim(
        self, _request: ClaimRequest, alone: Callable[[Connection], ClaimedRun | None]
    ) -> ClaimedRun | None:
        """Claim a run. Waits for Postgres until the worker drains."""
        return self.database.run(alone, keep_waiting=lambda: not self.slots.draining)

    async def end(
        self, ending: RunEnding, alone: Callable[[Connection], RunEnd | None]
    ) -> RunEnd | None:
        """Write the end of a run. Waits for Postgres until the lease is lost."""
        return self.database.run(
            alone, keep_waiting=lambda: self.asked_of(ending.claim) is not StopReason.LEASE_LOST
        )

    def saver(self, claim: Claim, **options: Any) -> RunSaver:
        """Return the saver of an attempt. `options` are those of `RunSaver`."""
        return RunSaver(self.database, claim, self.database_thread, **options)

    async def announce(self, end: RunEnd) -> None:
        """Announce an end."""
        self.announcer.announce([end])

    def uninterrupted(self, function: Callable[..., T], *args: Any) -> T:
        """Call a function of Belay's own. Stops raise only in nodes on the main thread, not on the
        event loop's."""
        return function(*args)

    async def blocking(self, call: Callable[[], T]) -> T:
        """Do a call that waits, on this thread."""
        return call()

    async def run(self, claim: Claim, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop while this, the main thread, serves its sync nodes.

        Returns its result or raises its exception. After a stop it returns only when nothing of
        the run is left: no node on the main thread, no thread, no subprocess, no task or callback
        of the project on the event loop. If that never happens, the supervisor kills this process.
        Processes that a run leaves behind are killed, unless the settings keep them.
        """
        if self._signals is None:  # after the warm-up, when all handlers of the child are set
            self._signals = NodeSignals()
        self._leftovers.begin_run()
        if self.settings.keep_subprocesses:
            self._processes_before = set(descendants(os.getpid()))
        self._claim, self._asked, self._task = claim, StopReason.NONE, None
        try:
            future: Future[T] = self._nodes.serve(
                lambda: asyncio.run_coroutine_threadsafe(self._as_task(work), self._loop)
            )
            if self._asked is not StopReason.NONE:
                self._task = None
                self._wait_for_leftovers()
        finally:
            self._claim = None
            self._has_its_limits = self._limits.restore()
            self._restore()  # nodes on other threads may set timers, too
            if not self.settings.keep_subprocesses:
                self._forkserver.end()
                end_children(self._processes_of_our_own)
        return future.result()

    @property
    def has_work(self) -> bool:
        """Whether runs have left threads, tasks or processes in this child that are to go on."""
        return bool(
            self._leftovers.any_threads()
            or asyncio.all_tasks(self._loop)
            or (
                self.settings.keep_subprocesses
                and set(descendants(os.getpid())).difference(self._processes_of_our_own)
            )
        )

    @property
    def is_usable(self) -> bool:
        """Whether the next run can be executed here: no run has left less than it needs."""
        is_whole = self._has_its_limits and not self._has_cut_an_import
        return is_whole and not self._nodes.is_shut_down

    def _restore(self) -> None:
        """Undo what a node has done to the signals and hooks of the main thread."""
        self._project_code.remove_hooks()
        if self._signals is not None:
            self._signals.restore()

    async def end_leftovers(self) -> None:
        """End what the graph of the last run has left in the background, unless `run` has done so
        after a stop."""
        if self._asked is not StopReason.NONE:
            return
        self.slot.stopping()
        self._wait_for_leftovers()
        self.slot.finishing()

    async def finish(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a short coroutine of Belay's own, which has no nodes and is not stopped."""
        return self.on_loop(work)

    def on_loop(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a short coroutine of Belay's own on the event loop, and wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _run_loop(self) -> None:
        """Run the event loop. It ends only when an async node raises SystemExit, which then ends
        this child."""
        try:
            self._loop.run_forever()
        except BaseException:
            log.exception("the event loop of child %d ended", os.getpid())
        os.kill(os.getpid(), signal.SIGKILL)

    async def _as_task(self, work: Coroutine[Any, Any, T]) -> T:
        self._task = asyncio.current_task()
        self._loop_leftovers.begin_run()
        if self._asked is not StopReason.NONE:
            work.close()
            raise asyncio.CancelledError
        try:
            return await work
        except BaseException as error:
            if self._asked is not StopReason.NONE:
                _release_locals(error)
            raise
        finally:
            self._project_code.remove_hooks()
            self._project_code.restore_methods(self._loop)

    def _on_ask(self, _signal: int, frame: FrameType | None) -> None:
        """Handle the supervisor's signal: cancel the task, and raise in a synchronous node.

        A request for another run than the current one is ignored.
        """
        if self._claim is None or self._asked is not StopReason.NONE:
            return
        asked = self.slot.asked(self._claim)
        if asked is StopReason.NONE:
            return
        self._asked = asked
        if self._task is not None:
            self._loop.call_soon_threadsafe(self._task.cancel)
        self._has_cut_an_import |= is_importing(frame)
        self._nodes.raise_in_node()

    def _wait_for_leftovers(self) -> None:
        """Wait until everything that the run started has ended. The supervisor limits the time."""
        idle = threading.Event()
        killed: set[psutil.Process] = set()
        while self.on_loop(self._loop_leftovers.remain()) or self._has_leftovers(killed):
            idle.wait(_LEFTOVER_SECONDS)
        self._loop_leftovers.end_run()

    def _has_leftovers(self, killed: set[psutil.Process]) -> bool:
        """Return whether processes or threads of the run are left. Kill the former, and add them to
        `killed`: threads may wait for them."""
        left = set(descendants(os.getpid())).difference(self._processes_before)
        if left:
            self._forkserver.end()
            psutil.wait_procs(left & killed, timeout=0)  # if the code that started them does not
            for process in left - killed:
                kill_with_descendants(process)
            killed |= left
        return bool(left) or self._nodes.pool_is_busy or self._leftovers.has_threads()


def _call_back(run: RunOnLoop, function: Callable[[Future[Any]], Any], future: Future[Any]) -> None:
    """Call a callback of a future for threads, unless its run was stopped."""
    if not run.is_stopped:
        function(future)


def _release_locals(error: BaseException | None) -> None:
    """Clear the frames through which an exception and its causes went, which keep local variables
    of a stopped run's nodes for as long as its future exists."""
    seen = set[int]()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
