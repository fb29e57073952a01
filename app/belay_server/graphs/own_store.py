"""Open and use the project's own store: `store.path` of `langgraph.json`.

It replaces Belay's store in Postgres, for the API and for graphs.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from contextvars import Context
from typing import Any

from langgraph.store.base import BaseStore

from belay_server.domain.errors import BelayError, Unavailable
from belay_server.graphs.project.langgraph_json import Project
from belay_server.graphs.project.own_object import OwnObject, load_own_object

log = logging.getLogger(__name__)


def load_own_store(project: Project) -> Any:
    """Return what `store.path` names, as `load_own_object`. Raises ProjectError."""
    assert project.store.path is not None
    return load_own_object(project, project.store.path, "store.path", BaseStore)


class OwnStore(BaseStore):
    """The project's store in one process. Operations may be called on any thread."""

    supports_ttl = True

    def __init__(self, made: Any) -> None:
        """`made` is what `load_own_store` has returned. Make this object where it is used, after
        the last fork: it starts a thread."""
        self._opened: OwnObject[BaseStore] = OwnObject(made, "store.path", BaseStore)

    def batch(self, ops: Iterable[Any]) -> list[Any]:
        return self._start(list(ops)).result()

    async def abatch(self, ops: Iterable[Any]) -> list[Any]:
        done = asyncio.wrap_future(self._start(list(ops)))
        done.add_done_callback(_retrieve)
        # A cancelled caller does not cancel the call: it may have been done already.
        return await asyncio.shield(done)

    def _start(self, ops: list[Any]) -> _Call:
        call = _Call(self._opened, ops)
        # In an empty context, so that what the store starts is not the current run's.
        Context().run(self._opened.loop.call_soon_threadsafe, call.begin)
        return call


def _retrieve(done: asyncio.Future[Any]) -> None:
    """Retrieve the error of a call, for which its caller may not have waited."""
    if not done.cancelled():
        done.exception()


class OwnRunStore(OwnStore):
    """The project's store for the graphs of a child process or a host."""

    def __init__(self, made: Any) -> None:
        super().__init__(made)
        self._calls: set[_Call] = set()
        self._attempt_is_over = threading.Event()
        # Threads that the store starts when it is opened are not the first run's.
        self._start([])

    def of_place(self) -> OwnRunStore:
        """Return the store of the place of one run at a time."""
        store = copy.copy(self)
        store._calls = set()
        return store

    @contextmanager
    def of_run(self, keep_waiting: Callable[[], bool]) -> Iterator[OwnRunStore]:  # noqa: ARG002
        """Yield the store of one attempt. After the block it raises RuntimeError: what the attempt
        left behind in this process must not go on writing."""
        store = copy.copy(self)
        store._attempt_is_over = threading.Event()
        try:
            yield store
        finally:
            store._attempt_is_over.set()

    @property
    def is_used(self) -> bool:
        """Whether calls are not done yet."""
        return bool(self._calls)

    @property
    def has_calls_to_cancel(self) -> bool:
        """Whether calls are not done yet, which `cancel_calls` would end."""
        return bool(self._calls)

    def settle(self, seconds: float) -> bool:
        """Wait until all calls are done, at most so many seconds. Return whether they are. A node
        that was stopped did not wait for its own."""
        return not wait(list(self._calls), seconds).not_done

    def cancel_calls(self) -> None:
        """Cancel the calls that are not done yet, each once."""
        for call in list(self._calls):
            self._opened.loop.call_soon_threadsafe(call.cancel_once)

    def _start(self, ops: list[Any]) -> _Call:
        if self._attempt_is_over.is_set():
            raise RuntimeError("The run of this store has ended")
        call = super()._start(ops)
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)
        return call


class OwnApiStore(OwnStore):
    """The project's store for the API. Its failure is not the server's."""

    def batch(self, ops: Iterable[Any]) -> list[Any]:
        """Raises Unavailable."""
        try:
            return super().batch(ops)
        except BelayError:
            raise
        except Exception as error:
            log.exception("the project's store (store.path) failed")
            kind = type(error).__name__
            raise Unavailable(f"The project's store failed: {kind}") from error


class _Call(Future[list[Any]]):
    """A call of a store. It is done when nothing of it is executed any longer."""

    def __init__(self, opened: OwnObject[BaseStore], ops: list[Any]) -> None:
        super().__init__()
        self._opened = opened
        self._ops = ops
        self._task: asyncio.Task[list[Any]] | None = None

    def begin(self) -> None:
        """Begin the call, on the store's event loop."""
        self._task = self._opened.loop.create_task(
            self._opened.use(lambda store: store.abatch(self._ops))
        )
        self._task.add_done_callback(self._end)

    def cancel_once(self) -> None:
        """Cancel the call on the store's event loop, unless that was done before."""
        if self._task is not None and not self._task.cancelling():
            self._task.cancel()

    def _end(self, task: asyncio.Task[list[Any]]) -> None:
        if task.cancelled():  # CancelledError would be taken for a stop of the run
            self.set_exception(RuntimeError("the call of the project's store was cancelled"))
        elif (error := task.exception()) is not None:
            self.set_exception(error)
        else:
            self.set_result(task.result())
