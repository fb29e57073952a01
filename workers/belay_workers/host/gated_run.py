"""One run on the event loop of a host: which code is its own, and what that has started."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from contextvars import Context, ContextVar, copy_context
from types import AsyncGeneratorType
from typing import Any, TypeVar
from weakref import WeakSet, ref

import psutil

from belay_server.domain.runs import Claim
from belay_workers.execution.copies import end_copy
from belay_workers.execution.stops import RunCancelled
from belay_workers.slots import Slot

#: The run in whose context code is executed. Tasks have the context of what has started them.
_RUN: ContextVar[GatedRun | None] = ContextVar("belay_gated_run", default=None)

T = TypeVar("T")


class _Executed(threading.local):
    """The run whose code a thread executes, whatever context that has entered."""

    run: GatedRun | None = None


#: What the threads execute, which `Gates` sets.
EXECUTED = _Executed()


class GatedRun:
    """The code of one run on the event loop of a host, and what it has started."""

    def __init__(self, claim: Claim, slot: Slot) -> None:
        self.claim = claim
        #: In which its code is executed.
        self.context = copy_context()
        self.context.run(_RUN.set, self)
        #: None once the run has ended: its slot is another run's then.
        self.slot: Slot | None = slot
        self.tasks: set[asyncio.Task[Any]] = set()
        #: Whether its code is executed no more.
        self.is_frozen = False
        #: Whether it was stopped, and nothing of it is left.
        self.is_stopped = False
        #: Whether its code was interrupted anywhere: it may hold a lock of the process for good.
        self.was_interrupted = False
        #: The identifiers of the threads that execute its code on an event loop now.
        self.stepped_by: set[int] = set()
        #: Whether it has added callbacks of the project's code to an event loop, and the file
        #: descriptors for which it has added readers or writers: what is looked for at a stop.
        self.has_callbacks = False
        self.descriptors: set[int] = set()
        #: Coroutines, tasks and generators that must not be closed nor collected.
        self.kept: list[Any] = []
        #: Whether it has started processes, and those that are not known to have ended (`started`).
        self.has_processes = False
        self.processes: set[psutil.Process] = set()
        self.threads: WeakSet[threading.Thread] = WeakSet()
        #: The identifiers of threads that were started without `threading`.
        self.idents: set[int] = set()
        #: Its asynchronous generators, in the order in which their iteration began.
        self.generators: dict[int, ref[AsyncGeneratorType[Any, Any]]] = {}

    @staticmethod
    def current() -> GatedRun | None:
        """Return the run whose code calls this, None outside of runs."""
        return _RUN.get() or EXECUTED.run

    @staticmethod
    def of_context(context: Context) -> GatedRun | None:
        """Return the run to which code in a context belongs."""
        return context.get(_RUN)

    @staticmethod
    def of(handle: asyncio.Handle) -> GatedRun | None:
        """Return the run to which a callback on the event loop belongs."""
        return GatedRun.of_context(handle._context)  # type: ignore[attr-defined]

    @property
    def is_in_progress(self) -> bool:
        """Return whether it has not ended yet."""
        return self.slot is not None

    def adopt(self, context: Context) -> Context:
        """Return a copy of a context, in which code belongs to this run."""
        copied = context.copy()
        copied.run(_RUN.set, self)
        return copied

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Do a call of this run on another thread: what it starts is the run's, too."""
        pid = os.getpid()
        outer, EXECUTED.run = EXECUTED.run, self
        try:
            return function(*args, **kwargs)
        finally:
            end_copy(pid)
            EXECUTED.run = outer

    def call_back(self, function: Callable[[Any], Any], future: Any) -> None:
        """Call a callback of a future, unless this run was stopped."""
        if not (self.is_frozen or self.is_stopped):
            self.call(function, future)

    def freeze(self) -> None:
        """Execute no more code of this run on the event loop. Its tasks end at their next step."""
        self.is_frozen = True
        for task in list(self.tasks):
            self.cancel(task)

    def cancel(self, task: asyncio.Task[Any]) -> None:
        """Cancel a task of this run, which may be on an event loop of another thread. It is done as
        code of this run: a task of another run for which this one waits goes on."""
        context, loop = self.adopt(Context()), task.get_loop()
        if loop is asyncio._get_running_loop():
            context.run(task.cancel)
        elif not loop.is_closed():
            with suppress(RuntimeError):  # it has just been closed
                loop.call_soon_threadsafe(task.cancel, context=context)

    def living_tasks(self, loop: asyncio.AbstractEventLoop) -> set[asyncio.Task[Any]]:
        """Return its tasks that have not ended, on this event loop and on others that run."""
        tasks = [task for task in list(self.tasks) if not task.done()]
        return {one for one in tasks if one.get_loop() is loop or one.get_loop().is_running()}

    def keep_task(self, task: asyncio.Task[Any]) -> None:
        """Keep a task of this run until it ends."""
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def leave_slot(self) -> None:
        """Leave the slot to the next run. What the run has left goes on, if anything."""
        if self.slot is not None:
            self.slot.stepping(0.0)
        self.slot = None


def executed_run() -> GatedRun | None:
    """Return the run whose code this thread executes, None for code of Belay's own."""
    return EXECUTED.run


def uninterrupted(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call a function of Belay's own, in which `Gates.interrupt` does not raise: that would leave
    what all runs share half changed. An interruption that comes meanwhile follows it."""
    run, EXECUTED.run = EXECUTED.run, None
    try:
        result = function(*args, **kwargs)
    finally:
        EXECUTED.run = run
    interrupt(run)
    return result


def interrupt(run: GatedRun | None) -> None:
    """Raise RunCancelled in the code of a run, if it is to be interrupted."""
    if run is not None and run.slot is not None and run.slot.is_interrupted(run.claim):
        run.was_interrupted = True
        EXECUTED.run = None
        raise RunCancelled
