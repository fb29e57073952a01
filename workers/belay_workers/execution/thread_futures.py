"""Attribute callbacks of `concurrent.futures` to the runs that add them. Whatever ends the future
calls them, which may be the code of another run, after their own was stopped."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from functools import partial, wraps
from typing import Any, TypeVar

from belay_workers.execution.project_code import ProjectCode

R = TypeVar("R")


def attribute_callbacks(
    project: ProjectCode, current: Callable[[], R | None], call: Callable[..., Any]
) -> None:
    """Let `call(run, function, future)` call a callback of the project's that a run has added.
    `current` returns the run whose code is executed. Applies to all futures of this process."""
    add = Future.add_done_callback

    @wraps(add)
    def adding(future: Future[Any], function: Callable[[Future[Any]], Any]) -> None:
        run = current()
        if run is not None and project.has(function):
            function = partial(call, run, function)
        add(future, function)

    Future.add_done_callback = adding  # type: ignore[method-assign,assignment]
