"""End what a stopped run has left on the event loop of its host, on threads and in processes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import AsyncGeneratorType
from typing import Any

from belay_workers.child.loop_leftovers import close_generators
from belay_workers.execution.loop_callbacks import callback_of
from belay_workers.host.event_loop import HostLoop, LoopPolicy
from belay_workers.host.gated_run import GatedRun
from belay_workers.host.gates import Gates
from belay_workers.host.started import Started
from belay_workers.host.threads import RunThreads

_TURN_SECONDS = 0.05


class HostLeftovers:
    """Ends what stopped runs leave on one event loop, on threads and in processes."""

    def __init__(
        self,
        loop: HostLoop,
        policy: LoopPolicy,
        gates: Gates,
        threads: RunThreads,
        started: Started,
    ) -> None:
        self._loop: Any = loop
        self._policy = policy
        self._gates = gates
        self._threads = threads
        self._started = started

    async def end(self, run: GatedRun, has_calls: Callable[[], bool] = lambda: False) -> None:
        """Wait until nothing of a stopped run is left: no task, generator, callback of the project,
        thread, process or call of the project's store (`has_calls`). The supervisor limits the
        time."""
        cancelled: set[asyncio.Task[Any]] = set()
        while True:
            strays = run.living_tasks(self._loop)
            for stray in strays - cancelled:
                run.cancel(stray)
            if not strays and (suspended := _suspended(run)):
                strays = {self._close(run, suspended)}
            cancelled |= strays
            if here := {stray for stray in strays if stray.get_loop() is self._loop}:
                await asyncio.wait(here, timeout=_TURN_SECONDS)
                await asyncio.sleep(0)  # the callbacks of the tasks may start others
            self._remove_callbacks(run)
            has_threads = self._threads.work_for(run) or run.stepped_by
            is_busy = bool(has_threads or self._started.end(run, is_stopped=True) or has_calls())
            has_tasks = bool(run.living_tasks(self._loop))
            if not (has_tasks or is_busy or (_suspended(run) and not run.is_frozen)):
                run.is_stopped = True
                return
            if run.is_frozen and not has_tasks and run.slot is not None:
                run.slot.note_left_threads()  # they cannot be frozen
            if not here:
                await asyncio.sleep(_TURN_SECONDS / 10)

    def _close(
        self, run: GatedRun, generators: list[AsyncGeneratorType[Any, Any]]
    ) -> asyncio.Task[Any]:
        """Close generators in the run's own context: their `finally` blocks may be frozen, too."""
        if run.is_frozen:
            run.kept += generators
            return self._loop.create_task(asyncio.sleep(0))  # type: ignore[no-any-return]
        return run.context.run(self._loop.create_task, close_generators(generators))

    def _remove_callbacks(self, run: GatedRun) -> None:
        """Cancel the callbacks of the project's code that wait in the run's context. Those of
        libraries stay: other runs may use the same connection."""
        if run.has_callbacks:
            for loop in (self._loop, *self._policy.loops):
                for handle in loop.handles(run):
                    handle.cancel()
        watched = self._loop._selector.get_map()
        for key in [watched[one] for one in run.descriptors if one in watched]:
            reader, writer = key.data or (None, None)
            if self._is_removed(run, reader):
                self._loop._remove_reader(key.fd)
            if self._is_removed(run, writer):
                self._loop._remove_writer(key.fd)

    def _is_removed(self, run: GatedRun, handle: Any) -> bool:
        """Return whether a reader or writer is the run's: it calls the project's code, or accepts a
        server's connections."""
        if handle is None or GatedRun.of(handle) is not run:
            return False
        called = (callback_of(handle), *(handle._args or ()))
        is_accepting = "_accept_connection" in [getattr(one, "__name__", "") for one in called]
        return is_accepting or self._gates.has_callback(run, handle)


def _suspended(run: GatedRun) -> list[AsyncGeneratorType[Any, Any]]:
    found = [one() for one in list(run.generators.values())]
    living = [generator for generator in found if generator is not None]
    return [one for one in living if one.ag_frame is not None and not one.ag_running]
