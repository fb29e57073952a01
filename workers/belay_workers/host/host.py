"""A host: a process that executes many runs on one event loop, on its main thread.

The parent sends the ids of runs (`pool/host_process.py`); each is attempted in a task. The event
loop is on the main thread because a signal handler raises there: that is how code which blocks the
loop is interrupted. Statements of all runs go through one connection, in order.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from types import FrameType
from typing import Any
from uuid import UUID

from belay_server.db import run_claims as claim_rows
from belay_server.db.postgres.connection import Connection
from belay_server.db.run_claims import ClaimRequest, RunEnding
from belay_server.domain.runs import ClaimedRun
from belay_server.services.runs.endings import RunEnd, end_runs
from belay_workers.child.limits import NodeLimits
from belay_workers.execution.attempt import attempt_run
from belay_workers.execution.executing_process import ExecutingProcess
from belay_workers.execution.project_code import ProjectCode
from belay_workers.execution.stops import ASK_SIGNAL, is_importing
from belay_workers.execution.thread_futures import attribute_callbacks
from belay_workers.host.announcements import Announcements
from belay_workers.host.event_loop import HostLoop, LoopPolicy
from belay_workers.host.gated_run import GatedRun
from belay_workers.host.gates import Gates
from belay_workers.host.group_commit import GroupCommit, Together
from belay_workers.host.hosted_place import HostedPlace
from belay_workers.host.leftovers import HostLeftovers
from belay_workers.host.owned_tasks import separate_tasks
from belay_workers.host.signal_handlers import HostSignals
from belay_workers.host.started import Started
from belay_workers.host.threads import RunThreads
from belay_workers.pool.host_process import RunStream
from belay_workers.slots import Kind

log = logging.getLogger(__name__)

_HELPERS = 8


class Host(ExecutingProcess):
    """The process, and the event loop of its runs."""

    def __init__(self, *parts: Any, graph_ids: list[str], **options: Any) -> None:
        """`graph_ids` are the graphs whose runs share hosts. The rest are the parameters of
        `ExecutingProcess`."""
        super().__init__(*parts, kind=Kind.HOST, **options)
        self._shared_graphs = graph_ids
        #: The threads for calls of Belay's own that wait for Redis or for the broker.
        self.helpers = ThreadPoolExecutor(_HELPERS, thread_name_prefix="belay-helper")
        self._project_code = ProjectCode(self.graphs.has_code)
        self._started = Started()
        self._gates = Gates()
        self.loop = HostLoop(self._project_code, self._gates)
        # Event loops that the project starts on threads belong to the runs that use them, too.
        elsewhere = Gates(is_of_host=False)
        self._policy = LoopPolicy(self._project_code, elsewhere)
        asyncio.set_event_loop_policy(self._policy)
        asyncio.set_event_loop(self.loop)
        self._threads = RunThreads()
        attribute_callbacks(self._project_code, GatedRun.current, GatedRun.call_back)
        self.loop.set_default_executor(self._threads.executor)
        #: What the runs store together: `claims`, `ends`, and their checkpoints.
        self.commits = GroupCommit(self.database, self.database_thread, self.loop)
        self.claims: Together[ClaimRequest, ClaimedRun | None] = Together(
            self._claim, key=lambda request: request.token_hash
        )
        self.ends: Together[RunEnding, RunEnd | None] = Together(
            end_runs, key=lambda ending: ending.claim.run_id
        )
        self.announcements = Announcements(self.announcer, self.loop)
        self.leftovers: HostLeftovers
        self._places: set[HostedPlace] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_worn = False
        #: How many runs have been stopped, and how many are being stopped.
        self.stops = 0
        self.stopping = 0
        #: The runs that were frozen: their coroutines must not be collected.
        self._frozen: list[GatedRun] = []
        #: Whether a look for stops is due on the event loop.
        self._will_look = False
        #: For what is done between the runs' steps, whichever run the signal has interrupted.
        self._context = copy_context()
        signal.signal(ASK_SIGNAL, self._on_ask)
        self._limits = NodeLimits()
        self._signals = HostSignals(self.loop)
        separate_tasks()

    def serve(self, connection: socket.socket) -> None:
        """Execute the runs that the parent sends, until it closes the connection."""
        self.loop.run_until_complete(self._serve(RunStream(connection)))

    async def _serve(self, runs: RunStream) -> None:
        self.leftovers = HostLeftovers(
            self.loop, self._policy, self._gates, self._threads, self._started
        )
        ended = asyncio.Event()

        def receive() -> None:
            for run_id in runs.receive():
                task = self.loop.create_task(self._attempt(run_id, runs))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            if runs.is_closed:
                self.loop.remove_reader(runs)
                ended.set()

        self.loop.add_reader(runs, receive)
        runs.report_ready()
        await ended.wait()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _attempt(self, run_id: UUID, runs: RunStream) -> None:
        """Attempt a run, and report its end to the parent."""
        was_claimed = False
        try:
            with self._place() as place:
                was_claimed = await attempt_run(place, run_id)
        except Exception:
            log.exception("the attempt of run %s failed", run_id)
        finally:
            runs.report_end(run_id, was_claimed=was_claimed)
            if self._is_worn:
                runs.report_worn()

    @contextmanager
    def _place(self) -> Iterator[HostedPlace]:
        """Yield a place for a run."""
        place = HostedPlace(self)
        self._places.add(place)
        try:
            yield place
        finally:
            self._places.discard(place)
            place.release()

    def graph_ids(self) -> list[str]:
        """Return the graphs whose runs it may claim: not those that have been isolated."""
        isolated = {self.graphs.graph_ids[number] for number in self.slots.isolated()}
        return [graph_id for graph_id in self._shared_graphs if graph_id not in isolated]

    def _claim(
        self, conn: Connection, requests: Sequence[ClaimRequest]
    ) -> Mapping[str, ClaimedRun | None]:
        """Claim several runs. Return those that were claimed."""
        for request in requests:
            request.may_be_held = True
        return claim_rows.claim_runs(
            conn,
            requests,
            owner=self.owner,
            lease_seconds=self.settings.lease_seconds,
            graph_ids=self.graph_ids(),
        )

    def clean_up(self, run: GatedRun) -> None:
        """Note that the graph of a run is not executed any more."""
        if run.is_frozen:
            self._frozen.append(run)
        if run.is_frozen or run.was_interrupted:
            self._is_worn = True
            self.slot.note_worn()
        if run.has_processes:
            if not self.settings.keep_subprocesses:
                self._started.end(run, is_stopped=run.is_stopped)
            self._started.forget(run)
        # Hooks are the process's: one that a run has left would be called in another run, which may
        # be another caller's.
        self._project_code.remove_hooks()
        self._project_code.restore_methods(self.loop)
        self._limits.restore()
        self._signals.restore_after(run)

    def _on_ask(self, _signal: int, frame: FrameType | None) -> None:
        """Handle the supervisor's signal, between two steps or within one that blocks the loop.

        An import is not interrupted, as the modules are those of all runs: the host is killed.
        """
        if not self._will_look:  # one look finds the stops of many runs
            # In this order: a further signal may raise RunCancelled between the two.
            self.loop.call_soon_threadsafe(self._look_for_stops, context=self._context)
            self._will_look = True
        if not is_importing(frame):
            self._gates.interrupt()

    def _look_for_stops(self) -> None:
        self._will_look = False
        for place in list(self._places):
            place.look_for_a_stop()
