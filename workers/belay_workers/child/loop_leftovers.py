"""End what a stopped run has left on its child's event loop, and find what cannot be ended.

The tasks that were started in its context are cancelled, then its asynchronous generators are
closed: otherwise their `finally` would run when the garbage collector finalizes them. A callback of
the project's own code that waits to be called (`call_soon`, `call_later`, `add_reader`) and a
socket that listens stay: while there is one that the run may have left, the child is not free, and
the supervisor kills it. What earlier runs keep does not count, such as a pool of connections, or a
timer that a client of the project's starts again and again. Nor do the timers of libraries, most of
which close idle connections; those that call code of the project later (APScheduler) are not found.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import socket
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from contextvars import Context
from types import (
    AsyncGeneratorType,
    CodeType,
    CoroutineType,
    GeneratorType,
)
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

from belay_workers.child.event_loop import RUN, RunOnLoop
from belay_workers.execution.loop_callbacks import callback_of, identity, reached
from belay_workers.execution.project_code import ProjectCode

log = logging.getLogger(__name__)

_TURN_SECONDS = 0.05
_Chain = tuple[CodeType, ...]
_LONGEST_CHAIN = 200


class LoopLeftovers:
    """Distinguishes what one run leaves on the event loop from what was on it before.

    Applies to asyncio's own loops; on one of another library only tasks are found.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, project: ProjectCode) -> None:
        self._loop: Any = loop
        self._project = project
        self._callbacks_before: dict[tuple[int, int], Any] = {}
        self._listening_before: set[tuple[int, int]] = set()
        self._run = RunOnLoop()
        self._run_of: WeakKeyDictionary[asyncio.Task[Any], RunOnLoop | None] = WeakKeyDictionary()
        #: What the tasks of earlier runs were executing when the run began.
        self._tasks_before: WeakKeyDictionary[asyncio.Task[Any], _Chain] = WeakKeyDictionary()
        self._cancelled: WeakSet[asyncio.Task[Any]] = WeakSet()
        #: The run's generators in the order in which their iteration began.
        self._generators: dict[int, ref[AsyncGeneratorType[Any, Any]]] = {}
        self._loops_own_hook: Callable[[Any], None] | None = None

    def begin_run(self) -> None:
        """Note what earlier runs have left. Call it in the run's own task."""
        self._run = RunOnLoop()
        RUN.set(self._run)
        self._tasks_before = WeakKeyDictionary(
            {task: _chain(task) for task in asyncio.all_tasks(self._loop)}
        )
        # The callbacks are kept, so that no other object gets their identity.
        self._callbacks_before = {
            identity(callback): callback
            for handle, is_io in self._handles()
            for callback in (callback_of(handle), *reached(self._project, handle, is_io=is_io))
        }
        self._listening_before = set(self._listening())
        self._generators = {}
        self._watch_generators()
        self._loop.set_task_factory(self._new_task)  # a node may have set another

    async def remain(self) -> bool:
        """Cancel the tasks, each once, and close the generators, and wait a moment for their ends.
        Return whether a task, a generator, a callback of the project or a listening socket is
        left."""
        if self._project.has(self._loop.get_exception_handler()):
            self._loop.set_exception_handler(None)
        strays = self._strays()
        for stray in strays.difference(self._cancelled):
            stray.cancel()
        if not strays and (suspended := self._suspended()):
            strays = {asyncio.create_task(close_generators(suspended))}
        self._cancelled.update(strays)
        if strays:
            await asyncio.wait(strays, timeout=_TURN_SECONDS)
            await asyncio.sleep(0)  # the callbacks of the tasks may start others
        return bool(
            self._strays()
            or self._suspended()
            or any(map(self._works_for_the_run, asyncio.all_tasks(self._loop)))
            or any(self._is_projects(handle, is_io) for handle, is_io in self._handles())
            or set(self._listening()) - self._listening_before
        )

    def end_run(self) -> None:
        """Let the loop drop callbacks of the stopped run from now on. Call it when nothing of the
        run remains."""
        self._run.is_stopped = True

    def _new_task(
        self,
        loop: asyncio.AbstractEventLoop,
        coro: Any,
        *,
        context: Context | None = None,
        **options: Any,
    ) -> asyncio.Task[Any]:
        task = asyncio.Task(coro, loop=loop, context=context, **options)
        self._run_of[task] = RUN.get() if context is None else context.get(RUN)
        return task

    def _strays(self) -> set[asyncio.Task[Any]]:
        """Return the tasks of the run, and new ones whose context is of no run, such as those that
        a thread has started. What earlier runs keep (a pool of connections, a session) is theirs,
        also if it starts further tasks."""
        return {
            task
            for task in asyncio.all_tasks(self._loop) - {asyncio.current_task(self._loop)}
            if task not in self._tasks_before and self._run_of.get(task) in (None, self._run)
        }

    def _works_for_the_run(self, task: asyncio.Task[Any]) -> bool:
        """Return whether a task of an earlier run executes code of the project that it did not
        execute when the run began: the run may have handed it over."""
        if task is asyncio.current_task(self._loop):
            return False
        chain, before = _chain(task), self._tasks_before.get(task, ())
        if chain == before[: len(chain)]:
            return False
        return any(self._project.has_code(code) for code in chain if code not in before)

    def _watch_generators(self) -> None:
        """Note the generators whose iteration begins in the run's context, on this thread."""
        hook = sys.get_asyncgen_hooks().firstiter
        if self._loops_own_hook is None:
            self._loops_own_hook = hook
        if hook != self._note_generator:
            sys.set_asyncgen_hooks(firstiter=self._note_generator)

    def _note_generator(self, generator: Any) -> None:
        if RUN.get() is self._run:
            generators, key = self._generators, id(generator)
            generators[key] = ref(generator, lambda _: generators.pop(key, None))
        if self._loops_own_hook is not None:
            self._loops_own_hook(generator)

    def _suspended(self) -> list[AsyncGeneratorType[Any, Any]]:
        found = [one() for one in list(self._generators.values())]
        living = [generator for generator in found if generator is not None]
        return [one for one in living if one.ag_frame is not None and not one.ag_running]

    def _handles(self) -> Iterator[tuple[asyncio.Handle, bool]]:
        """Yield the callbacks that are due, those that wait for their time, and those that wait for
        a file descriptor; whether they wait for one."""
        for name in ("_ready", "_scheduled"):
            yield from ((handle, False) for handle in list(getattr(self._loop, name, ())))
        for key in self._keys():
            yield from ((handle, True) for handle in key.data or () if handle is not None)

    def _is_projects(self, handle: asyncio.Handle, is_io: bool) -> bool:
        if identity(callback_of(handle)) in self._callbacks_before:
            return False
        found = reached(self._project, handle, is_io=is_io)
        return any(identity(callback) not in self._callbacks_before for callback in found)

    def _keys(self) -> list[Any]:
        selector = getattr(self._loop, "_selector", None)
        return [] if selector is None else list(selector.get_map().values())

    def _listening(self) -> Iterator[tuple[int, int]]:
        """Yield the descriptor and the inode of each socket on which the loop accepts
        connections."""
        for key in self._keys():
            with suppress(OSError):  # closed without the loop's knowledge
                found = os.fstat(key.fd)
                if stat.S_ISSOCK(found.st_mode) and _accepts(key.fd):
                    yield key.fd, found.st_ino


def _chain(task: asyncio.Task[Any]) -> _Chain:
    """Return the code of a task's coroutine, of what that awaits, and so on."""
    found: list[CodeType] = []
    one: Any = task.get_coro()
    for _ in range(_LONGEST_CHAIN):
        for prefix, awaited in (("cr", "cr_await"), ("ag", "ag_await"), ("gi", "gi_yieldfrom")):
            if (code := getattr(one, f"{prefix}_code", None)) is not None:
                found.append(code)
                one = getattr(one, awaited)
                break
        else:  # an awaitable without code, such as that of an asynchronous generator's `anext`
            kinds = (CoroutineType, AsyncGeneratorType, GeneratorType)
            one = next((of for of in gc.get_referents(one) if isinstance(of, kinds)), None)
        if one is None:
            break
    return tuple(found)


async def close_generators(generators: list[AsyncGeneratorType[Any, Any]]) -> None:
    """Close generators one after the other: an outer one, which began first, may close those that
    it iterates."""
    for generator in generators:
        try:
            await generator.aclose()
        except Exception:
            log.info("a generator of a stopped run raised when it was closed", exc_info=True)


def _accepts(descriptor: int) -> bool:
    with socket.socket(fileno=os.dup(descriptor)) as same:
        return bool(same.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
