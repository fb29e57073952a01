"""Objects that belong to one event loop, such as connections of an asynchronous client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

_T = TypeVar("_T")


class PerLoop(Generic[_T]):
    """Opens an object in each event loop that asks for it, and closes it with that event loop.

    `asyncio.run` and `asyncio.Runner` end the asynchronous generators of their event loop. So the
    object is held by a generator, which closes it then.
    """

    def __init__(self, opens: Callable[[], _T], closes: Callable[[_T], Awaitable[None]]) -> None:
        self._opens = opens
        self._closes = closes
        self._held: WeakKeyDictionary[asyncio.AbstractEventLoop, tuple[_T, AsyncGenerator[_T]]] = (
            WeakKeyDictionary()
        )

    async def get(self) -> _T:
        """Return the object of the running event loop."""
        loop = asyncio.get_running_loop()
        if loop not in self._held:
            holder = self._hold()
            self._held[loop] = (await anext(holder), holder)
        return self._held[loop][0]

    async def _hold(self) -> AsyncGenerator[_T]:
        made = self._opens()
        try:
            yield made
        finally:
            await self._closes(made)
