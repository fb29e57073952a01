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
        if self.done() or self.foreign_caller() is None:
            return super().__await__()
        return asyncio.shield(self).__await__()

    __iter__ = __await__


def show_only_own_tasks() -> None:
    """Let `asyncio.all_tasks`, called by code of a run, leave out Belay's tasks and those of other
    runs in progress."""
    make_replaceable()["all_tasks"].wrap(_without_foreign)


def _without_foreign(all_tasks: Callable[..., set[Any]]) -> Callable[..., set[Any]]:
    @wraps(all_tasks)
    def own_tasks(loop: asyncio.AbstractEventLoop | None = None) -> set[Any]:
        return {task for task in all_tasks(loop) if not _is_foreign(task)}

    return own_tasks


def _is_foreign(task: asyncio.Task[Any]) -> bool:
    return isinstance(task, OwnedTask) and task.foreign_caller() is not None
