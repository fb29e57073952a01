"""Load and open an object that the project brings instead of one of Belay's: `store.path` and
`checkpointer.path` of `langgraph.json`.

Each process opens it when it is first used, on an event loop of its own: a connection is bound to
the loop that has opened it, while graphs, the API and threads use the object from anywhere.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any, Generic, TypeVar

from belay_server.graphs.project.langgraph_json import Project
from belay_server.graphs.project.loading import ProjectError, load_object
from belay_server.runtime.event_loop import loop_in_a_real_thread

_T = TypeVar("_T")
_Kind = TypeVar("_Kind")

#: The time limit of one call, which may open the object, in seconds.
_CALL_SECONDS = 60.0


def load_own_object(project: Project, target: str, key: str, kind: type[Any]) -> Any:
    """Return what `target` names: an object of a kind, or a function without parameters that
    returns one, or a context manager (also an asynchronous one) that yields one. `key` is that of
    `langgraph.json`. Raises ProjectError."""
    made = load_object(project.root, project.dependencies, target, key)
    if not isinstance(made, kind) and not callable(made):
        raise ProjectError(
            f"{key} ({target}): must be a {kind.__name__}, or a function that returns one or "
            "yields one as a context manager"
        )
    return made


class OwnObject(Generic[_Kind]):
    """The project's object in one process, once it is open, and its event loop. Make it where it is
    used, after the last fork: it starts a thread."""

    def __init__(self, made: Any, key: str, kind: type[Any]) -> None:
        """`made` is what `load_own_object` has returned."""
        self._made = made
        self._key = key
        self._kind = kind
        self.loop = loop_in_a_real_thread()
        self._opening = asyncio.Lock()
        self._object: _Kind | None = None
        #: Never closed: processes are killed.
        self._contexts = AsyncExitStack()

    async def use(self, call: Callable[[_Kind], Awaitable[_T]]) -> _T:
        """Call a function with the object, on its event loop, within the time limit. Raises
        TimeoutError."""
        try:
            async with asyncio.timeout(_CALL_SECONDS):
                async with self._opening:
                    if self._object is None:
                        self._object = await self._open()
                return await call(self._object)
        except (Exception, asyncio.CancelledError):
            raise
        except BaseException as error:  # it would end the event loop, or the process
            kind = type(error).__name__
            raise RuntimeError(f"the project's {self._key} raised {kind}: {error}") from error

    async def _open(self) -> _Kind:
        found: Any = self._made
        if not isinstance(found, self._kind):
            found = found()
        if inspect.isawaitable(found):
            found = await found
        if not isinstance(found, self._kind):
            if hasattr(found, "__aenter__"):
                found = await self._contexts.enter_async_context(found)
            elif hasattr(found, "__enter__"):
                found = self._contexts.enter_context(found)
        if not isinstance(found, self._kind):
            wanted = self._kind.__name__
            raise TypeError(f"{self._key} has made no {wanted} but a {type(found).__name__}")
        opened: _Kind = found
        return opened
