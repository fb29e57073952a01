"""Execute the statements of a host's runs together, on its one connection.

Claims, checkpoints and ends of runs that arrive while a statement is executed are gathered. They
are executed by the next statements: one for all claims, one for all checkpoints, one for all ends.
While no statement is executed, one that arrives is executed at once: gathering delays nothing.

A common statement waits for no lock, and stores all of its items or none. Items that it leaves out,
and all items after an error or an outage, are executed one by one, by the statements that a process
for a single run uses. The error of such a statement is raised in its own run only.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Executor
from contextvars import Context
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import psycopg

from belay_server.db.postgres.connection import Connection
from belay_server.db.postgres.reconnecting import ReconnectingConnection
from belay_workers.host.gated_run import uninterrupted

log = logging.getLogger(__name__)

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
#: The largest number of items of one statement.
_MOST = 100
#: Seconds for which an item whose result nobody awaits is delayed, so that others join it.
_SOON_SECONDS = 0.005


@dataclass(frozen=True, slots=True)
class Together(Generic[_Item, _Result]):
    """A statement for several items. `work` returns the results by the items' keys, without those
    that it has left out. Calls for items with the same key that wait together are done once."""

    work: Callable[[Connection, Sequence[_Item]], Mapping[Any, _Result]]
    key: Callable[[_Item], Hashable]


@dataclass(slots=True)
class _Call:
    """An item that waits, and the function that executes it alone."""

    together: Together[Any, Any]
    item: Any
    alone: Callable[[Connection], Any]
    keep_waiting: Callable[[], bool]
    #: The futures of the callers that await the result.
    futures: list[asyncio.Future[Any]] = field(default_factory=list)
    result: Any = None
    error: BaseException | None = None
    is_done: bool = False


class GroupCommit:
    """Gathers the statements of a host's runs. Use it on the event loop's thread."""

    def __init__(
        self, database: ReconnectingConnection, thread: Executor, loop: asyncio.AbstractEventLoop
    ) -> None:
        """`thread` is the single thread on which the connection is used."""
        self._database = database
        self._thread = thread
        self._loop = loop
        #: Guards the attributes below.
        self._lock = threading.Lock()
        #: The items that wait, by statement and key.
        self._waiting: dict[tuple[int, Hashable], _Call] = {}
        #: Whether the connection's thread is scheduled to execute the waiting items.
        self._is_due = False
        #: Whether a timer is set that will do so.
        self._is_due_soon = False

    async def do(
        self,
        together: Together[_Item, _Result],
        item: _Item,
        *,
        alone: Callable[[Connection], _Result],
        keep_waiting: Callable[[], bool],
    ) -> _Result:
        """Execute an item with others, or `alone`, and return its result. Raises the errors of
        `ReconnectingConnection.run` and of `alone`."""
        call = _Call(together, item, alone, keep_waiting)
        future: asyncio.Future[_Result] = uninterrupted(self._add_and_schedule, call)
        return await future

    def do_soon(
        self,
        together: Together[_Item, _Result],
        item: _Item,
        *,
        alone: Callable[[Connection], _Result],
        keep_waiting: Callable[[], bool],
    ) -> None:
        """Execute an item with the next statement, or 5 ms later, without returning its result:
        `alone` must not raise."""
        uninterrupted(self._add_and_schedule_soon, _Call(together, item, alone, keep_waiting))

    def _add_and_schedule(self, call: _Call) -> asyncio.Future[Any]:
        future = self._loop.create_future()
        call.futures.append(future)
        self._add(call)
        self._schedule()
        return future

    def _add_and_schedule_soon(self, call: _Call) -> None:
        self._add(call)
        with self._lock:
            if self._is_due or self._is_due_soon:
                return
            self._is_due_soon = True
        # Not in the context of the run that came first.
        self._loop.call_later(_SOON_SECONDS, self._schedule, context=Context())

    def _add(self, call: _Call) -> None:
        key = id(call.together), call.together.key(call.item)
        with self._lock:
            waiting = self._waiting.setdefault(key, call)
            if waiting is not call:
                waiting.futures += call.futures

    def _schedule(self) -> None:
        with self._lock:
            if self._is_due:
                return
            self._is_due = True
        self._thread.submit(self._do_all)

    def _do_all(self) -> None:
        """Execute the waiting items. Called on the connection's thread."""
        with self._lock:
            self._is_due = self._is_due_soon = False
            calls, self._waiting = list(self._waiting.values()), {}
        for batch in _batches(calls):
            if len(batch) > 1:
                self._do_together(batch)
            for call in batch:
                if not call.is_done:
                    self._do_alone(call)
        if any(call.futures for call in calls):
            self._loop.call_soon_threadsafe(_resolve, calls, context=Context())

    def _do_together(self, calls: list[_Call]) -> None:
        together = calls[0].together

        def work(conn: Connection) -> Mapping[Any, Any]:
            return together.work(conn, [call.item for call in calls])

        try:
            found = self._database.run(work, keep_waiting=lambda: False)
        except psycopg.Error as error:
            log.debug("%d items are done one by one: %s", len(calls), error)
            return
        except Exception:
            log.exception("a common statement failed; its %d items are done one by one", len(calls))
            return
        for call in calls:
            key = together.key(call.item)
            if key in found:
                call.result, call.is_done = found[key], True

    def _do_alone(self, call: _Call) -> None:
        try:
            call.result = self._database.run(call.alone, keep_waiting=call.keep_waiting)
        except BaseException as error:  # noqa: BLE001  (raised by the call that waits)
            call.error = error
        call.is_done = True


def _batches(calls: list[_Call]) -> list[list[_Call]]:
    """Return the calls by statement, those of one statement in the order in which they came."""
    by_statement: dict[int, list[_Call]] = {}
    for call in calls:
        by_statement.setdefault(id(call.together), []).append(call)
    return [
        of_statement[at : at + _MOST]
        for of_statement in by_statement.values()
        for at in range(0, len(of_statement), _MOST)
    ]


def _resolve(calls: list[_Call]) -> None:
    for call in calls:
        for future in call.futures:
            if future.done():  # it was cancelled
                continue
            if call.error is not None:
                future.set_exception(call.error)
            else:
                future.set_result(call.result)
