"""The event loops of a host. Code of a run cannot escape its run by a callback or a task with a
context of its own, nor take from the host's loop what all runs need."""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque
from collections.abc import Callable
from contextvars import Context
from functools import partial
from typing import Any
from weakref import WeakSet

from belay_workers.execution.copies import end_copy
from belay_workers.execution.loop_callbacks import is_of_project, owner_of
from belay_workers.execution.project_code import ProjectCode
from belay_workers.host.gated_run import GatedRun, uninterrupted
from belay_workers.host.gates import Gates
from belay_workers.host.generators import Generators
from belay_workers.host.owned_tasks import OwnedTask

log = logging.getLogger(__name__)


class AttributingLoop(asyncio.SelectorEventLoop):
    """An event loop whose tasks and callbacks belong to runs.

    Code that blocks it is interrupted anywhere, but not while the loop's heap of timers or its
    selector is changed: the timers of all runs would be late.
    """

    def __init__(self, project: ProjectCode, gates: Gates) -> None:
        self._project = project
        self._gates = gates
        self._generators = Generators()
        super().__init__()
        super().set_task_factory(gates.new_task)

    def _call_soon(self, callback: Any, args: Any, context: Context | None) -> asyncio.Handle:
        handle: asyncio.Handle = super()._call_soon(callback, args, context)  # type: ignore[misc]
        self._attribute(handle, has_own_context=context is not None)
        return handle

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        call_at = super().call_at
        timer = uninterrupted(call_at, when, callback, *args, context=context)
        self._attribute(timer, has_own_context=context is not None)
        return timer

    def _add_reader(self, fd: Any, callback: Any, *args: Any) -> asyncio.Handle:
        add: Any = super()._add_reader  # type: ignore[misc]
        handle: asyncio.Handle = uninterrupted(add, fd, callback, *args)
        self._attribute(handle, is_io=True)
        self._note_descriptor(handle, fd, self._remove_reader)
        return handle

    def _add_writer(self, fd: Any, callback: Any, *args: Any) -> asyncio.Handle:
        add: Any = super()._add_writer  # type: ignore[misc]
        handle: asyncio.Handle = uninterrupted(add, fd, callback, *args)
        self._attribute(handle, is_io=True)
        self._note_descriptor(handle, fd, self._remove_writer)
        return handle

    def _note_descriptor(self, handle: Any, fd: Any, remove: Callable[[Any], bool]) -> None:
        if (run := GatedRun.of(handle)) is None:
            return
        run.descriptors.add(self._selector.get_key(fd).fd)  # type: ignore[attr-defined]
        if self._gates.has_callback(run, handle):
            _, function, *args = handle._args
            handle._args = (run, _UntilItFails(run, function, partial(remove, fd)), *args)

    def _remove_reader(self, fd: Any) -> bool:
        remove: Callable[[Any], bool] = super()._remove_reader  # type: ignore[misc]
        return uninterrupted(remove, fd)

    def _remove_writer(self, fd: Any) -> bool:
        remove: Callable[[Any], bool] = super()._remove_writer  # type: ignore[misc]
        return uninterrupted(remove, fd)

    def add_signal_handler(  # type: ignore[override]
        self, sig: int, callback: Callable[..., Any], *args: Any
    ) -> None:
        super().add_signal_handler(sig, callback, *args)
        self._attribute(self._signal_handlers[sig], is_io=True)  # type: ignore[attr-defined]

    def _asyncgen_firstiter_hook(self, generator: Any) -> None:
        if (run := GatedRun.current()) is not None:
            self._generators.note(run, generator)
        super()._asyncgen_firstiter_hook(generator)  # type: ignore[misc]

    def _asyncgen_finalizer_hook(self, generator: Any) -> None:
        close: Callable[[Any], None] = super()._asyncgen_finalizer_hook  # type: ignore[misc]
        run = self._generators.run_of_dying(generator)
        if run is None:
            close(generator)
        elif run.is_frozen or run.is_stopped:
            run.kept.append(generator)
        else:
            run.context.copy().run(close, generator)

    def _attribute(
        self, handle: Any, *, has_own_context: bool = False, is_io: bool = False
    ) -> None:
        """Let a callback belong to the run that adds it, and be called through the gates if it is
        code of the project.

        One of a library with a context of its own belongs to what has made that context: a future
        calls back what waits for it, which may be Belay. A method of a task, such as `cancel`, is
        called as code of the run that has scheduled it.
        """
        if self._gates.is_step(handle):
            return
        run = GatedRun.of(handle) or GatedRun.current()
        if run is None:
            return
        is_projects = is_of_project(self._project, handle, is_io=is_io)
        is_of_task = isinstance(owner_of(handle._callback), OwnedTask)
        is_adopted = is_projects or is_of_task or not has_own_context
        if GatedRun.of(handle) is not run and is_adopted:
            handle._context = run.adopt(handle._context)
        run.has_callbacks |= is_projects
        if is_projects and handle._callback != self._gates.call:
            handle._args = (run, handle._callback, *handle._args)
            handle._callback = self._gates.call

    def handles(self, run: GatedRun) -> list[asyncio.Handle]:
        """Return the callbacks of a run that are due, and those that wait for their time."""
        waiting: list[Any] = [*self._ready, *self._scheduled]  # type: ignore[attr-defined]
        return [handle for handle in waiting if self._gates.has_callback(run, handle)]


class _UntilItFails:
    """A callback that a run has added for a file descriptor. If it raises after the end of the run,
    it is removed: the event loop would call it again at once, without end."""

    def __init__(
        self, run: GatedRun, function: Callable[..., Any], remove: Callable[[], bool]
    ) -> None:
        self._run = run
        self._function = function
        self._remove = remove

    def __call__(self, *args: Any) -> Any:
        try:
            return self._function(*args)
        except BaseException:
            if not self._run.is_in_progress:
                log.warning(
                    "removed a reader or writer of run %s: it raised", self._run.claim.run_id
                )
                self._remove()
            raise


class LoopPolicy(asyncio.DefaultEventLoopPolicy):
    """Makes the event loops of the project's threads, on which runs may start things, too."""

    def __init__(self, project: ProjectCode, gates: Gates) -> None:
        super().__init__()
        self._project = project
        self._gates = gates
        #: The loops that were made.
        self.loops: WeakSet[AttributingLoop] = WeakSet()

    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        loop = AttributingLoop(self._project, self._gates)
        self.loops.add(loop)
        return loop


class _EndOfCopy(deque[asyncio.Handle]):
    """The callbacks that are due, in a copy of the process: taking the next one ends it."""

    def popleft(self) -> asyncio.Handle:
        os._exit(1)


class HostLoop(AttributingLoop):
    """The event loop of the host itself. It ignores a run which would stop it, or replace how tasks
    and calls on threads are attributed, and callbacks that raise SystemExit, as `sys.exit` does.

    A copy of the process that code of a run has made by `os.fork`, and that comes back to the event
    loop, ends.
    """

    #: How often it has executed what was due.
    turns = 0

    def __init__(self, project: ProjectCode, gates: Gates) -> None:
        super().__init__(project, gates)
        self._pid = os.getpid()
        os.register_at_fork(after_in_child=self._end_at_next_handle)

    def _end_at_next_handle(self) -> None:
        """End this process, which is a copy, when the event loop takes its next callback."""
        self._ready: deque[asyncio.Handle] = _EndOfCopy(self._ready)

    def _run_once(self) -> None:
        end_copy(self._pid)
        self.turns += 1
        try:
            super()._run_once()  # type: ignore[misc]
        except (SystemExit, KeyboardInterrupt):
            # What is due after it is executed in the next turn.
            log.exception("ignored what a callback raised, which would end the loop of all runs")

    def stop(self) -> None:
        if not _is_ignored("loop.stop"):
            super().stop()

    def set_task_factory(self, factory: Callable[..., Any] | None) -> None:
        if not _is_ignored("loop.set_task_factory"):
            super().set_task_factory(factory)

    def set_exception_handler(self, handler: Any) -> None:
        if not _is_ignored("loop.set_exception_handler"):
            super().set_exception_handler(handler)

    def set_default_executor(self, executor: Any) -> None:
        if not _is_ignored("loop.set_default_executor"):
            super().set_default_executor(executor)

    async def shutdown_asyncgens(self) -> None:
        if not _is_ignored("loop.shutdown_asyncgens"):  # they are those of all runs
            await super().shutdown_asyncgens()

    async def shutdown_default_executor(self, *args: Any) -> None:
        if not _is_ignored("loop.shutdown_default_executor"):
            await super().shutdown_default_executor(*args)


def _is_ignored(call: str) -> bool:
    """Return whether a call comes from a run, and log that it has no effect."""
    run = GatedRun.current()
    if run is None:
        return False
    log.warning("ignored %s() of run %s, which shares its process", call, run.claim.run_id)
    return True
