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
from contextvars import Context, copy_context
from typing import Any
from weakref import WeakKeyDictionary

from belay_workers.execution.copies import end_copy
from belay_workers.execution.loop_callbacks import TASKS
from belay_workers.execution.stops import RunCancelled
from belay_workers.host.gated_run import EXECUTED, GatedRun, interrupt
from belay_workers.host.owned_tasks import OwnedTask

#: The type with which asyncio's own tasks schedule their steps, and the names of the methods with
#: which they, and those written in Python, schedule the others and what follows a wait.
_STEP = "TaskStepMethWrapper"
_STEPS = {"__step", "__wakeup", "task_wakeup"}


class Gates:
    """The gates of one event loop, or of those of other threads. `new_task` is the task factory.

    With `is_of_host`, the loop is the host's own: the slots of runs show when their steps began,
    and tasks of no run are Belay's.
    """

    def __init__(self, *, is_of_host: bool = True) -> None:
        self._is_of_host = is_of_host
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
        run = (context and GatedRun.of_context(context)) or GatedRun.current()
        if run is None:
            kind = OwnedTask if self._is_of_host else asyncio.Task
            return kind(coro, loop=loop, context=context, **options)
        if GatedRun.of_context(copy_context() if context is None else context) is not run:
            context = run.adopt(copy_context() if context is None else context)
        gate = _Gate(coro, run, self)
        task = OwnedTask(gate, owner=run, loop=loop, context=context, **options)
        run.keep_task(task)
        return task

    def is_step(self, handle: Any) -> bool:
        """Return whether a callback on the event loop is a step of a task.

        Let it be executed through a gate if a run has made the task without the task factory, by
        `asyncio.Task(...)`.
        """
        step = handle._callback
        task = getattr(step, "__self__", None)
        if not isinstance(task, TASKS) or not _is_step_of_task(step):
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
        interrupt(EXECUTED.run)

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
        outer, slot = EXECUTED.run, run.slot if self._is_of_host else None
        pid = os.getpid()
        run.stepped_by.add(thread := threading.get_ident())
        if slot is not None:
            slot.stepping(time.monotonic())
        try:
            try:
                EXECUTED.run = run
                return function(*args)
            except (SystemExit, KeyboardInterrupt) as error:  # they would end the event loop
                raise RuntimeError(f"The node raised {type(error).__name__}: {error}") from error
            finally:
                EXECUTED.run = outer  # `interrupt` may raise until here
        finally:
            end_copy(pid)
            EXECUTED.run = outer
            run.stepped_by.discard(thread)
            if slot is not None and run.slot is not None:
                slot.stepping(0.0)


def _is_step_of_task(method: Any) -> bool:
    """Return whether a method of a task executes its next step, unlike `cancel`."""
    return type(method).__name__ == _STEP or getattr(method, "__name__", "") in _STEPS


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
