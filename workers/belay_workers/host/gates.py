"""Gates: they let code of a run be executed on a host's event loop, until the run is frozen.

Every task that a run starts gets a gate around its coroutine, and every callback of the project's
code that it adds is called through `Gates.call`. Before and after each step it is noted in the
run's slot that the loop executes code of this run, so that the supervisor sees which run blocks the
loop.

A run is frozen when it goes on although it was asked to stop. Its gates then end their tasks
without executing another line of it, also where its code catches every exception. The coroutines
are kept for as long as the host lives: if they were closed or collected, their `finally` blocks
would be executed. Such a host is replaced.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from contextvars import Context, ContextVar, copy_context
from types import AsyncGeneratorType
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, WeakSet, ref

import psutil

from belay_server.domain.runs import Claim
from belay_workers.execution.copies import end_copy
from belay_workers.execution.loop_callbacks import TASKS
from belay_workers.execution.stops import RunCancelled
from belay_workers.slots import Slot

#: The run in whose context code is executed. Tasks have the context of what has started them.
_RUN: ContextVar[GatedRun | None] = ContextVar("belay_gated_run", default=None)

T = TypeVar("T")
#: The type with which asyncio's own tasks schedule their steps.
_STEP = "TaskStepMethWrapper"


class _Executed(threading.local):
    """The run whose code a thread executes, whatever context that has entered."""

    run: GatedRun | None = None


_EXECUTED = _Executed()


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
        return _RUN.get() or _EXECUTED.run

    @staticmethod
    def of(handle: asyncio.Handle) -> GatedRun | None:
        """Return the run to which a callback on the event loop belongs."""
        context: Context = handle._context  # type: ignore[attr-defined]
        return context.get(_RUN)

    def adopt(self, context: Context) -> Context:
        """Return a copy of a context, in which code belongs to this run."""
        copied = context.copy()
        copied.run(_RUN.set, self)
        return copied

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Do a call of this run on another thread: what it starts is the run's, too."""
        pid = os.getpid()
        outer, _EXECUTED.run = _EXECUTED.run, self
        try:
            return function(*args, **kwargs)
        finally:
            end_copy(pid)
            _EXECUTED.run = outer

    def call_back(self, function: Callable[[Any], Any], future: Any) -> None:
        """Call a callback of a future, unless this run was stopped."""
        if not (self.is_frozen or self.is_stopped):
            self.call(function, future)

    def freeze(self) -> None:
        """Execute no more code of this run on the event loop. Its tasks end at their next step."""
        self.is_frozen = True
        for task in list(self.tasks):
            cancel(task)

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


def cancel(task: asyncio.Task[Any]) -> None:
    """Cancel a task, which may be on an event loop of another thread."""
    loop = task.get_loop()
    if loop is asyncio._get_running_loop():
        task.cancel()
    elif not loop.is_closed():
        with suppress(RuntimeError):  # it has just been closed
            loop.call_soon_threadsafe(task.cancel, context=Context())


def executed_run() -> GatedRun | None:
    """Return the run whose code this thread executes, None for code of Belay's own."""
    return _EXECUTED.run


def uninterrupted(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call a function of Belay's own, in which `Gates.interrupt` does not raise: that would leave
    what all runs share half changed. An interruption that comes meanwhile follows it."""
    run, _EXECUTED.run = _EXECUTED.run, None
    try:
        result = function(*args, **kwargs)
    finally:
        _EXECUTED.run = run
    _interrupt(run)
    return result


def _interrupt(run: GatedRun | None) -> None:
    """Raise RunCancelled in the code of a run, if it is to be interrupted."""
    if run is not None and run.slot is not None and run.slot.is_interrupted(run.claim):
        run.was_interrupted = True
        _EXECUTED.run = None
        raise RunCancelled


class Gates:
    """The gates of one event loop, or of those of other threads. `new_task` is the task factory.

    With `shows_steps`, the slots of runs show when their steps began.
    """

    def __init__(self, *, shows_steps: bool = True) -> None:
        self._shows_steps = shows_steps
        #: The tasks that runs have made without the task factory.
        self._ungated: WeakKeyDictionary[asyncio.Task[Any], GatedRun] = WeakKeyDictionary()

    def new_task(
        self,
        loop: asyncio.AbstractEventLoop,
        coro: Any,
        *,
        context: Context | None = None,
        **options: Any,
    ) -> asyncio.Task[Any]:
        run = (None if context is None else context.get(_RUN)) or GatedRun.current()
        if run is None:
            return asyncio.Task(coro, loop=loop, context=context, **options)
        if (copy_context() if context is None else context).get(_RUN) is not run:
            context = run.adopt(copy_context() if context is None else context)
        task = asyncio.Task(_Gate(coro, run, self), loop=loop, context=context, **options)
        run.keep_task(task)
        return task

    def is_step(self, handle: Any) -> bool:
        """Return whether a callback on the event loop is a step of a task.

        Let it be executed through a gate if a run has made the task without the task factory, by
        `asyncio.Task(...)`.
        """
        step = handle._callback
        task = getattr(step, "__self__", None)
        if not isinstance(task, TASKS):
            return False
        if type(task.get_coro()) is _Gate:
            return True
        run = self._ungated.get(task) or GatedRun.of(handle)
        if run is None and _is_scheduled_by_itself(step):
            run = GatedRun.current()
        if run is not None:
            if task not in self._ungated:
                self._ungated[task] = run
                run.keep_task(task)
            handle._callback, handle._args = self._step_of, (run, task, step, *handle._args)
        return True

    def _step_of(
        self, run: GatedRun, task: asyncio.Task[Any], step: Callable[..., Any], *args: Any
    ) -> None:
        """Execute a step of a task without a gate, unless the run is frozen."""
        if run.is_frozen:
            run.tasks.discard(task)
            run.kept.append(task)
        else:
            self.step(run, step, *args)

    def interrupt(self) -> None:
        """Raise RunCancelled in the code that the event loop executes, if its run is to be
        interrupted. Called by a signal handler, on the loop's thread."""
        _interrupt(_EXECUTED.run)

    def call(self, run: GatedRun, function: Callable[..., Any], *args: Any) -> Any:
        """Call a callback of a run, unless the run is frozen or was stopped."""
        if run.is_frozen or run.is_stopped:
            return None
        return self.step(run, function, *args)

    def has_callback(self, run: GatedRun, handle: Any) -> bool:
        """Return whether a callback on the event loop is one of the run's that is called through
        the gates."""
        return handle._callback == self.call and handle._args[0] is run

    def step(self, run: GatedRun, function: Callable[..., Any], *args: Any) -> Any:
        """Execute code of a run, up to its next `await`."""
        outer, slot = _EXECUTED.run, run.slot if self._shows_steps else None
        pid = os.getpid()
        run.stepped_by.add(thread := threading.get_ident())
        if slot is not None:
            slot.stepping(time.monotonic())
        try:
            try:
                _EXECUTED.run = run
                return function(*args)
            except (SystemExit, KeyboardInterrupt) as error:  # they would end the event loop
                raise RuntimeError(f"The node raised {type(error).__name__}: {error}") from error
            finally:
                _EXECUTED.run = outer  # `interrupt` may raise until here
        finally:
            end_copy(pid)
            _EXECUTED.run = outer
            run.stepped_by.discard(thread)
            if slot is not None and run.slot is not None:
                slot.stepping(0.0)


def _is_scheduled_by_itself(step: Any) -> bool:
    """Return whether a task has scheduled its own step: its first one, or after a bare `yield`.
    Else what the task waits for has scheduled it, which may be another run's."""
    return type(step).__name__ == _STEP or getattr(step, "__name__", "") == "__step"


class _Gate(Coroutine[Any, Any, Any]):
    """A coroutine of a run."""

    __slots__ = ("_coro", "_gates", "_run")

    def __init__(self, coro: Any, run: GatedRun, gates: Gates) -> None:
        self._coro = coro
        self._run = run
        self._gates = gates

    def send(self, value: Any) -> Any:
        return self._step(self._coro.send, value)

    def throw(self, *raised: Any) -> Any:
        return self._step(self._coro.throw, *raised)

    def close(self) -> None:
        if self._run.is_frozen:
            self._run.kept.append(self._coro)
        else:
            self._coro.close()

    def __await__(self) -> Any:
        return self

    __iter__ = __await__

    def __next__(self) -> Any:
        return self.send(None)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the coroutine, such as `cr_frame`, which libraries read."""
        return getattr(self._coro, name)

    def _step(self, step: Any, *args: Any) -> Any:
        run = self._run
        if run.is_frozen:
            run.kept.append(self._coro)
            raise asyncio.CancelledError
        try:
            return self._gates.step(run, step, *args)
        except RunCancelled:
            if getattr(self._coro, "cr_frame", None) is not None:  # interrupted at its very end
                run.kept.append(self._coro)
            raise
