"""The event loop of a child process. It does not call what the code of a stopped run has left in
futures that outlive the run: whatever ends such a future is another run's, or a library's.

A copy of the process that a run has made by `os.fork` ends when its code returns to the event loop.
"""

from __future__ import annotations

import asyncio
import os
from contextvars import Context, ContextVar
from typing import Any

from belay_workers.execution.copies import end_copy
from belay_workers.execution.loop_callbacks import is_of_project
from belay_workers.execution.project_code import ProjectCode


class RunOnLoop:
    """One run, as the event loop of its child knows it."""

    def __init__(self) -> None:
        #: Whether it was stopped, and nothing of it is left.
        self.is_stopped = False


#: The run in whose context code is executed. Tasks have the context of what has started them.
RUN: ContextVar[RunOnLoop | None] = ContextVar("belay_run", default=None)


class ChildLoop(asyncio.SelectorEventLoop):
    """An event loop that drops callbacks of the project that belong to a stopped run."""

    def __init__(self, project: ProjectCode) -> None:
        self._project = project
        self._pid = os.getpid()
        super().__init__()

    def _run_once(self) -> None:
        end_copy(self._pid)
        super()._run_once()  # type: ignore[misc]

    def _call_soon(self, callback: Any, args: Any, context: Context | None) -> asyncio.Handle:
        handle: Any = super()._call_soon(callback, args, context)  # type: ignore[misc]
        run = handle._context.get(RUN)
        if run is not None and run.is_stopped and is_of_project(self._project, handle):
            handle.cancel()
        return handle  # type: ignore[no-any-return]


def new_loop(project: ProjectCode) -> asyncio.AbstractEventLoop:
    """Return the event loop of a child, or one of the library that the project has chosen by its
    event loop policy."""
    if type(asyncio.get_event_loop_policy()) is asyncio.DefaultEventLoopPolicy:
        return ChildLoop(project)
    return asyncio.new_event_loop()
