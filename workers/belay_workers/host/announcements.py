"""Announce the ends of a host's runs together: those that come while one announcement is made."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context

from belay_server.services.runs.endings import Announcer, RunEnd


class Announcements:
    """The announcements of a host. Use it on the event loop's thread."""

    def __init__(self, announcer: Announcer, loop: asyncio.AbstractEventLoop) -> None:
        self._announcer = announcer
        self._loop = loop
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="belay-helper")
        #: Guards what follows.
        self._lock = threading.Lock()
        self._waiting: list[tuple[RunEnd, asyncio.Future[None]]] = []
        self._is_due = False

    async def announce(self, end: RunEnd) -> None:
        """Announce an end. Never raises, as `Announcer.announce`."""
        future: asyncio.Future[None] = self._loop.create_future()
        with self._lock:
            self._waiting.append((end, future))
            is_due, self._is_due = self._is_due, True
        if not is_due:
            self._thread.submit(self._announce_all)
        await future

    def _announce_all(self) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting, []
            self._is_due = False
        self._announcer.announce([end for end, _ in waiting])
        futures = [future for _, future in waiting]
        self._loop.call_soon_threadsafe(_resolve, futures, context=Context())


def _resolve(futures: list[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)
