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

    @property
    def is_anothers(self) -> bool:
        """Return whether the code that asks belongs to a run, and the task to another one that is
        in progress, or to Belay."""
        run, owner = GatedRun.current(), self._owner
        if run is None or run is owner:
            return False
        return owner is None or owner.is_in_progress

    def cancel(self, msg: Any | None = None) -> bool:
        if not self.is_anothers:
            return super().cancel(msg)
        run = GatedRun.current()
        log.warning("ignored the cancel of a task that is not of run %s", run and run.claim.run_id)
        return False

    def __await__(self) -> Generator[Any, None, Any]:
        if self.is_anothers and not self.done():
            return asyncio.shield(self).__await__()
        return super().__await__()

    __iter__ = __await__


def show_only_own_tasks() -> None:
    """Let `asyncio.all_tasks` return to a run only its own tasks, and those of no run."""
    make_replaceable()["all_tasks"].wrap(_without_anothers)


def _without_anothers(all_tasks: Callable[..., set[Any]]) -> Callable[..., set[Any]]:
    @wraps(all_tasks)
    def own_tasks(loop: asyncio.AbstractEventLoop | None = None) -> set[Any]:
        found = all_tasks(loop)
        return {one for one in found if not (isinstance(one, OwnedTask) and one.is_anothers)}

    return own_tasks
