"""Tasks that belong to a run, or to the host itself, and that code of other runs cannot cancel.

`asyncio.all_tasks` returns the tasks of an event loop, and `Task.cancel` cancels any of them. In a
process of its own a run finds only its own tasks. In a host it would find those of its neighbours.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Generator
from functools import wraps
from typing import Any

from belay_workers.host.gated_run import GatedRun
from belay_workers.host.replaceable_functions import make_replaceable

log = logging.getLogger(__name__)


class OwnedTask(asyncio.Task[Any]):
    """A task of a host's event loop. While its run is in progress, code of other runs cannot cancel
    it: neither by `cancel`, nor by waiting for it in a task that is cancelled then."""

    def __init__(self, coro: Any, *, owner: GatedRun | None = None, **options: Any) -> None:
        """`owner` is the run to which it belongs, None for Belay's own. `options` are those of
        `asyncio.Task`."""
        self._owner = owner
        super().__init__(coro, **options)

    def foreign_caller(self) -> GatedRun | None:
        """Return the run whose code calls this, if the task is Belay's or belongs to another run in
        progress; else None."""
        run, owner = GatedRun.current(), self._owner
        is_foreign = run is not owner and (owner is None or owner.is_in_progress)
        return run if is_foreign else None

    def cancel(self, msg: Any | None = None) -> bool:
        """Cancel the task, unless code of another run calls this."""
        if (caller := self.foreign_caller()) is None:
            return super().cancel(msg)
        log.warning("ignored cancel() of a task that is not of run %s", caller.claim.run_id)
        return False

    def __await__(self) -> Generator[Any, None, Any]:
        """Wait for the task. Code of another run waits for a future of its own, which can be
        cancelled; `asyncio.shield` makes none for a task that is done."""
        waited_for = _own_future_for(self)
        return super().__await__() if waited_for is self else waited_for.__await__()

    __iter__ = __await__


def separate_tasks() -> None:
    """Change functions of asyncio, for calls by code of a run: `all_tasks` leaves out Belay's tasks
    and those of other runs in progress, and a run can stop waiting for these by `gather` and
    `wait_for`, which would cancel them."""
    functions = make_replaceable()
    functions["all_tasks"].wrap(_without_foreign)
    functions["gather"].wrap(_gathering)
    functions["wait_for"].wrap(_waiting)


def _without_foreign(all_tasks: Callable[..., set[Any]]) -> Callable[..., set[Any]]:
    @wraps(all_tasks)
    def own_tasks(loop: asyncio.AbstractEventLoop | None = None) -> set[Any]:
        return {task for task in all_tasks(loop) if not _is_foreign(task)}

    return own_tasks


def _gathering(gather: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(gather)
    def gathering(*awaitables: Any, **options: Any) -> Any:
        return gather(*map(_own_future_for, awaitables), **options)

    return gathering


def _waiting(wait_for: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(wait_for)
    async def waiting(fut: Any, timeout: float | None) -> Any:
        return await wait_for(_own_future_for(fut), timeout)

    return waiting


def _own_future_for(awaitable: Any) -> Any:
    """Return what code of a run waits for instead of an awaitable: for a task of another run that
    has not ended a future of its own, which can be cancelled; else the same."""
    if _is_foreign(awaitable) and not awaitable.done():
        return asyncio.shield(awaitable)
    return awaitable


def _is_foreign(awaitable: Any) -> bool:
    return isinstance(awaitable, OwnedTask) and awaitable.foreign_caller() is not None
