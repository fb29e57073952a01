"""Find what a run has left behind in its child process: threads and their work.

A thread that the run started is left behind while it lives. A thread of an earlier run (of a
library's client, a pool of the project, a tracer) may stay. It counts only while it works, as it
may work for this run.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import thread as pool_threads
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

from belay_workers.child.debugger import is_debuggers
from belay_workers.execution.loop_callbacks import identity, reached
from belay_workers.execution.project_code import ProjectCode

#: The standard library's modules in which a thread waits.
_WAITING = ("threading", "queue", "selectors", "concurrent.futures.thread")
#: Packages whose threads export traces or errors, or serve a debugger. They are ignored.
_TRACERS = (
    *("langsmith", "langfuse", "opentelemetry", "posthog", "sentry_sdk"),
    *("debugpy", "pydevd", "_pydevd_bundle", "_pydev_bundle"),
)
#: Packages whose threads are ignored while they are idle.
_CLIENTS = ("psycopg_pool",)
#: Modules that start threads, or wrap the work of all threads.
_AROUND_THREADS = (
    "threading",
    "opentelemetry.instrumentation.threading",
    "sentry_sdk.integrations.threading",
)
#: The function in which a thread of a pool does a call.
_CALL = pool_threads._WorkItem.run.__code__
_Stack = tuple[CodeType, ...]
#: A thread, or the identifier of one that was started without `threading`.
_Key = threading.Thread | int


@dataclass(frozen=True, slots=True)
class _Before:
    """What a thread did when the run began: its stack, outermost first, and its loop's tasks and
    callbacks of the project, by identity. They are kept, so that no other object gets theirs."""

    stack: _Stack
    on_loop: dict[Any, Any]


class Leftovers:
    """Distinguishes the threads of one run from those that existed before it."""

    def __init__(self, own: set[threading.Thread], project: ProjectCode) -> None:
        """`own` are the threads of the child process itself."""
        self._own = own
        self._project = project
        self._before: dict[_Key, _Before] = {}

    def begin_run(self) -> None:
        """Note the threads of earlier runs, and what they do."""
        self._before = {
            key: _Before(_stack(frame), self._on_loop(frame)) for key, frame in self._strangers()
        }

    def any_threads(self) -> bool:
        """Return whether there is a thread of any run."""
        return any(True for _ in self._strangers())

    def has_threads(self) -> bool:
        """Return whether a thread is left that the run started, or that may work for it."""
        return any(
            not self._is_at_rest(frame, self._before.get(key)) for key, frame in self._strangers()
        )

    def _strangers(self) -> Iterator[tuple[_Key, FrameType | None]]:
        """Yield the threads that are neither Belay's nor of a library that does no work of a run
        on them."""
        threads = threading.enumerate()
        frames = sys._current_frames()
        for thread in threads:
            frame = frames.pop(thread.ident or 0, None)
            if frame is None and isinstance(thread, threading._DummyThread):
                continue  # one that was not started by `threading`, has logged, and has ended
            if not self._is_belays(thread) and not is_debuggers(thread) and not _is_librarys(frame):
                yield thread, frame
        # Threads of `_thread.start_new_thread`. One that `threading` starts is not in its list
        # for a moment, and is not Belay's either: that starts none during a run.
        for ident, frame in frames.items():
            if not _is_librarys(frame):
                yield ident, frame

    def _is_at_rest(self, frame: FrameType | None, before: _Before | None) -> bool:
        """Return whether a thread waits for work where it was, or above, when the run began."""
        if before is None or frame is None:
            return False
        if self._on_loop(frame).keys() - before.on_loop.keys():
            return False
        at_work = _without_waiting(frame)
        return _stack(at_work) == before.stack[: len(_stack(at_work))]

    def _on_loop(self, frame: FrameType | None) -> dict[Any, Any]:
        """Return the tasks, and the callbacks of the project, of the event loop that runs on this
        stack, by identity."""
        found: dict[Any, Any] = {}
        for loop in _loops(frame):
            found |= {id(task): task for task in asyncio.all_tasks(loop)}
            for handle in (*getattr(loop, "_ready", ()), *getattr(loop, "_scheduled", ())):
                found |= {identity(one): one for one in reached(self._project, handle)}
        return found

    def _is_belays(self, thread: threading.Thread) -> bool:
        return thread in self._own or thread.name.startswith("belay-node")


def _without_waiting(frame: FrameType | None) -> FrameType | None:
    """Return the innermost frame that does not wait in the standard library. Where it is that of a
    pool's call, a function without a frame of its own is executed, such as `time.sleep`."""
    while frame is not None and _module(frame) in _WAITING and frame.f_code is not _CALL:
        frame = frame.f_back
    return frame


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    """Yield the frames of a stack, the innermost first."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def _stack(frame: FrameType | None) -> _Stack:
    return tuple(one.f_code for one in _frames(frame))[::-1]


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _is_librarys(frame: FrameType | None) -> bool:
    """Return whether the outermost function on a thread's stack is one of a tracer's, or of an idle
    client's."""
    modules = [_module(one) for one in _frames(frame) if _module(one) not in _AROUND_THREADS]
    if not modules:
        return False
    package = modules[-1].partition(".")[0]
    if package in _CLIENTS:
        is_waiting = frame is not None and _module(frame) in _WAITING
        return is_waiting and {one.partition(".")[0] for one in modules} <= {package, "queue"}
    return package in _TRACERS


def _loops(frame: FrameType | None) -> list[asyncio.AbstractEventLoop]:
    """Return the event loops that run on this stack."""
    loops = [
        one.f_locals.get("self")
        for one in _frames(frame)
        if one.f_code is asyncio.BaseEventLoop.run_forever.__code__
    ]
    return [loop for loop in loops if isinstance(loop, asyncio.AbstractEventLoop)]
