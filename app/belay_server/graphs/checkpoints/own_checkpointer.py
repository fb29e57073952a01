"""Keep the values of checkpoints in the project's own checkpointer: `checkpointer.path` of
`langgraph.json`.

Which checkpoints a thread has, and which writes of tasks await the next one, is in Postgres, where
it is fenced and rolled back. The project's checkpointer has each checkpoint whole; the values of
its channels are read from there, by the checkpoint's id. It is written first: what a run that has
lost its claim writes there is never referred to.

A row of a checkpoint whose values are there is marked by a key. If such a row is deleted, a trigger
notes it, and the values are deleted after the next end of a run or deletion of a thread.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from contextvars import Context
from typing import Any, TypeVar

from langgraph.checkpoint.base import BaseCheckpointSaver, CheckpointTuple
from langgraph.checkpoint.memory import InMemorySaver

from belay_server.db.own_checkpoints import Garbage
from belay_server.domain.errors import BelayError, StateUnreadable, Unavailable
from belay_server.graphs.project.langgraph_json import Project
from belay_server.graphs.project.own_object import OwnObject, load_own_object

log = logging.getLogger(__name__)

_KEY = "checkpointer.path"
#: How long a process waits at its start until it is open, in seconds.
_OPEN_SECONDS = 20.0
#: The key of a stored checkpoint without its values.
_IS_ELSEWHERE = "own_values"

_T = TypeVar("_T")
_Row = tuple[dict[str, Any], dict[str, Any]]
_Saver = BaseCheckpointSaver[Any]


def load_own_checkpointer(project: Project) -> Any:
    """Return what `checkpointer.path` names, as `load_own_object`. Raises ProjectError."""
    assert project.checkpointer is not None
    return load_own_object(project, project.checkpointer, _KEY, BaseCheckpointSaver)


def _without_values(checkpoint: Any) -> dict[str, Any]:
    return {**checkpoint, "channel_values": {}, _IS_ELSEWHERE: True}


def lacks_values(found: CheckpointTuple) -> bool:
    """Return whether the values of a checkpoint are in the project's checkpointer."""
    return _IS_ELSEWHERE in found.checkpoint


class OwnCheckpointer:
    """The project's checkpointer in one process. Its methods may be called on any thread; those
    whose names begin with `a` are for coroutines, on any event loop. They raise what it raises, and
    TimeoutError."""

    def __init__(self, made: Any) -> None:
        """`made` is what `load_own_checkpointer` has returned. Make this object where it is used,
        after the last fork: it starts a thread."""
        self._opened: OwnObject[_Saver] = OwnObject(made, _KEY, BaseCheckpointSaver)
        #: Those that are not done: an event loop has only weak references to its tasks.
        self._calls: set[asyncio.Task[None]] = set()

    def is_in_memory(self) -> bool:
        """Open it. Return whether it is LangGraph's own that keeps checkpoints in memory: another
        process would find none of them."""
        return self._begin(_is_in_memory).result(_OPEN_SECONDS)

    def put(self, config: Any, checkpoint: Any, metadata: Any, versions: Any) -> _Row:
        """Store a checkpoint, as a saver does. Return what Postgres stores of it: the checkpoint
        without values, and no version of a channel."""
        self._call(_putting(config, checkpoint, metadata, versions))
        return _without_values(checkpoint), {}

    async def aput(self, config: Any, checkpoint: Any, metadata: Any, versions: Any) -> _Row:
        """Store a checkpoint and return what Postgres stores of it, as `put` does."""
        await self._await(_putting(config, checkpoint, metadata, versions))
        return _without_values(checkpoint), {}

    def put_writes(self, *of_task: Any) -> None:
        """Store the writes of a task: the config of the checkpoint, the writes, the task's id and
        its path, as a saver gets them."""
        self._call(_putting_writes(*of_task))

    async def aput_writes(self, *of_task: Any) -> None:
        """Store the writes of a task, as `put_writes` does."""
        await self._await(_putting_writes(*of_task))

    def fill(self, found: CheckpointTuple) -> CheckpointTuple:
        """Return a checkpoint with its values. Raises StateUnreadable if they are gone."""
        return _filled(found, self._call(_getting(found)))

    async def afill(self, found: CheckpointTuple) -> CheckpointTuple:
        """Return a checkpoint with its values, as `fill` does."""
        return _filled(found, await self._await(_getting(found)))

    def copy(self, found: CheckpointTuple, thread_id: str) -> None:
        """Copy a checkpoint that has its values to another thread."""
        where = found.config["configurable"]
        before = (found.parent_config or {"configurable": {}})["configurable"]
        address = {
            "thread_id": thread_id,
            "checkpoint_ns": where["checkpoint_ns"],
            "checkpoint_id": before.get("checkpoint_id"),
        }
        metadata = {**found.metadata, "thread_id": thread_id}
        versions = found.checkpoint["channel_versions"]
        self.put({"configurable": address}, found.checkpoint, metadata, versions)

    def delete(self, garbage: Iterable[Garbage]) -> None:
        """Delete the checkpoints of threads that are gone, and of runs that are. Those of a run
        stay until their thread is deleted if the checkpointer cannot delete them, or if the thread
        has others of the run."""
        of_threads: dict[str, list[Garbage]] = {}
        for one in garbage:
            of_threads.setdefault(one.thread_id, []).append(one)
        for thread_id, runs in of_threads.items():
            if all(run.is_thread_gone for run in runs):
                self._call(_doing("delete_thread", thread_id))
            elif gone := [run.run_id for run in runs if run.run_id and run.is_run_gone]:
                self._call(_doing("delete_for_runs", gone))

    def _call(self, work: Callable[[_Saver], Awaitable[_T]]) -> _T:
        return self._begin(work).result()

    async def _await(self, work: Callable[[_Saver], Awaitable[_T]]) -> _T:
        done = asyncio.wrap_future(self._begin(work))
        done.add_done_callback(_retrieve)
        # A cancelled caller does not cancel the call: it may have been done already.
        return await asyncio.shield(done)

    def _begin(self, work: Callable[[_Saver], Awaitable[_T]]) -> Future[_T]:
        done: Future[_T] = Future()

        async def call() -> None:
            try:
                done.set_result(await self._opened.use(work))
            except asyncio.CancelledError:  # it would be taken for a stop of the run
                done.set_exception(RuntimeError(f"a call of the project's {_KEY} was cancelled"))
            except Exception as error:  # noqa: BLE001  (raised where the call was made)
                done.set_exception(error)

        def begin() -> None:
            task = self._opened.loop.create_task(call())
            self._calls.add(task)
            task.add_done_callback(self._calls.discard)

        # In an empty context, so that what the checkpointer starts is not the current run's.
        self._opened.loop.call_soon_threadsafe(begin, context=Context())
        return done


class OwnApiCheckpointer(OwnCheckpointer):
    """The project's checkpointer for the API. Its failure is not the server's."""

    def _call(self, work: Callable[[_Saver], Awaitable[_T]]) -> _T:
        """Raises Unavailable."""
        try:
            return super()._call(work)
        except BelayError:
            raise
        except Exception as error:
            log.exception("the project's checkpointer (%s) failed", _KEY)
            kind = type(error).__name__
            raise Unavailable(f"The project's checkpointer failed: {kind}") from error


def api_checkpointer(made: Any) -> OwnCheckpointer | None:
    """Return the project's checkpointer for a process of the API, None if it has none that others
    can read. `made` is what `load_own_checkpointer` has returned, or None."""
    checkpointer = None if made is None else _usable(OwnApiCheckpointer(made))
    if made is not None and checkpointer is None:
        log.warning("%s keeps checkpoints in memory: Belay's Postgres is used instead", _KEY)
    return checkpointer


def run_checkpointer(made: Any) -> OwnCheckpointer | None:
    """Return the project's checkpointer for a process that executes runs, as `api_checkpointer`."""
    return None if made is None else _usable(OwnCheckpointer(made))


def _usable(checkpointer: OwnCheckpointer) -> OwnCheckpointer | None:
    try:
        return None if checkpointer.is_in_memory() else checkpointer
    except Exception:
        log.exception("the project's checkpointer (%s) cannot be opened yet", _KEY)
        return checkpointer


async def _is_in_memory(saver: _Saver) -> bool:
    return isinstance(saver, InMemorySaver)


def _doing(name: str, of: Any) -> Callable[[_Saver], Awaitable[None]]:
    async def delete(saver: _Saver) -> None:
        with suppress(NotImplementedError):  # both are optional
            await _do(saver, name, of)

    return delete


def _putting(
    config: Any, checkpoint: Any, metadata: Any, versions: Any
) -> Callable[[_Saver], Awaitable[None]]:
    address = _address(config)

    async def put(saver: _Saver) -> None:
        await _do(saver, "put", address, checkpoint, metadata, versions)

    return put


def _putting_writes(
    config: Any, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str
) -> Callable[[_Saver], Awaitable[None]]:
    address = _address(config)

    async def put_writes(saver: _Saver) -> None:
        await _do(saver, "put_writes", address, writes, task_id, task_path)

    return put_writes


def _getting(found: CheckpointTuple) -> Callable[[_Saver], Awaitable[CheckpointTuple | None]]:
    async def get(saver: _Saver) -> CheckpointTuple | None:
        got: CheckpointTuple | None = await _do(saver, "get_tuple", found.config)
        return got

    return get


def _filled(found: CheckpointTuple, stored: CheckpointTuple | None) -> CheckpointTuple:
    where = found.config["configurable"]
    if stored is None:
        raise StateUnreadable(
            f"The project's checkpointer ({_KEY}) lacks checkpoint {where['checkpoint_id']} of "
            f"thread {where['thread_id']}"
        )
    checkpoint: Any = {**found.checkpoint, "channel_values": stored.checkpoint["channel_values"]}
    del checkpoint[_IS_ELSEWHERE]
    return found._replace(checkpoint=checkpoint)


def _address(config: Any) -> dict[str, Any]:
    """Return what a config says of a checkpoint. That of a run may have secrets."""
    where = config["configurable"]
    address = {"thread_id": where["thread_id"], "checkpoint_ns": where.get("checkpoint_ns", "")}
    if where.get("checkpoint_id"):
        address["checkpoint_id"] = where["checkpoint_id"]
    return {"configurable": address}


async def _do(saver: _Saver, name: str, *args: Any) -> Any:
    """Call an asynchronous method of a saver or, where it has none, the synchronous one on a
    thread. Raises NotImplementedError if it has neither."""
    try:
        return await getattr(saver, f"a{name}")(*args)
    except NotImplementedError:
        return await asyncio.to_thread(getattr(saver, name), *args)


def _retrieve(done: asyncio.Future[Any]) -> None:
    """Retrieve the error of a call, for which its caller may not have waited."""
    if not done.cancelled():
        done.exception()
