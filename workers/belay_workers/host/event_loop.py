"""The event loop of a host. Code of one run cannot take from it what all runs need."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from belay_workers.host.gates import GatedRun

log = logging.getLogger(__name__)


class HostLoop(asyncio.SelectorEventLoop):
    """An event loop that ignores a run which would stop it, or replace how tasks and calls on
    threads are attributed to runs."""

    def stop(self) -> None:
        if not _is_ignored("loop.stop"):
            super().stop()

    def set_task_factory(self, factory: Callable[..., Any] | None) -> None:
        if not _is_ignored("loop.set_task_factory"):
            super().set_task_factory(factory)

    def set_default_executor(self, executor: Any) -> None:
        if not _is_ignored("loop.set_default_executor"):
            super().set_default_executor(executor)

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
