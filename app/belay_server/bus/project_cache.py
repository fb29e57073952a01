"""Serve `langgraph_sdk.cache`, the key-value cache of a project's code, from Redis.

The SDK's functions call LangGraph's server if it is installed. Here they call these instead. As all
of Redis, the cache may be lost at any moment: without Redis, every key is missing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import orjson
import redis.asyncio

from belay_server.bus.client import Keys, RedisError
from belay_server.configuration.settings import Settings
from belay_server.runtime.hidden_modules import without
from belay_server.runtime.per_loop import PerLoop

with without("langgraph_api"):
    from langgraph_sdk import cache as sdk_cache

log = logging.getLogger(__name__)

#: The longest that a value is kept.
_LONGEST = timedelta(days=1)
#: The default of `SWRResult.mutate`: load the value again. None is a value.
_LOAD: Any = object()

Loader = Callable[[], Awaitable[Any]]


class ProjectCache:
    """A cache of JSON values. Its coroutines may be called from any event loop."""

    def __init__(self, settings: Settings) -> None:
        self._keys = Keys(settings.redis_prefix)
        self._clients = PerLoop(
            lambda: redis.asyncio.Redis.from_url(
                settings.redis_url, socket_timeout=2.0, socket_connect_timeout=1.0
            ),
            lambda client: client.aclose(),
        )
        self._refreshing: dict[str, asyncio.Task[Any]] = {}

    def install(self) -> None:
        """Make the SDK's functions use this cache, in this process."""
        functions = {"_cache_get": self.get, "_cache_set": self.set, "_api_swr": self.swr}
        for name, function in functions.items():
            setattr(sdk_cache, name, function)

    async def get(self, key: str) -> Any:
        """Return a value; None if there is none, it has expired, or Redis cannot be reached."""
        try:
            stored = await (await self._clients.get()).get(self._keys.cached(key))
        except RedisError as error:
            log.warning("cannot read the project's cache, taking the key as missing: %s", error)
            return None
        return None if stored is None else orjson.loads(stored)

    async def set(self, key: str, value: Any, ttl: timedelta | None = None) -> None:
        """Store a JSON value, for at most a day. Raise TypeError for a value that is not JSON."""
        kept = min(ttl, _LONGEST) if ttl else _LONGEST
        encoded = orjson.dumps(value)
        try:
            await (await self._clients.get()).set(
                self._keys.cached(key), encoded, px=max(1, int(kept.total_seconds() * 1000))
            )
        except RedisError as error:
            log.warning("cannot write to the project's cache: %s", error)

    async def swr(
        self,
        key: str,
        loader: Loader,
        *,
        fresh_for: timedelta,
        max_age: timedelta,
        model: Any = None,
    ) -> SwrResult:
        """Return a value that may be stale while it is loaded again in the background.

        See `langgraph_sdk.cache.swr`. Raise what `loader` raises where its value is awaited.
        """
        entry = _Entry(self, f"swr:{key}", loader, model)
        stored = await self.get(entry.key)
        if not isinstance(stored, dict) or "stored_at" not in stored:
            return SwrResult(await entry.load(), "miss", entry)
        age = time.time() - stored["stored_at"]
        if age >= min(max_age, _LONGEST).total_seconds():
            return SwrResult(await entry.load(), "expired", entry)
        value = entry.decoded(stored["value"])
        if age < fresh_for.total_seconds():
            return SwrResult(value, "fresh", entry)
        self._refresh(entry)
        return SwrResult(value, "stale", entry)

    def _refresh(self, entry: _Entry) -> None:
        """Load a value in the background, unless this process does so already."""
        if entry.key in self._refreshing:
            return
        task = asyncio.get_running_loop().create_task(entry.load())
        self._refreshing[entry.key] = task
        task.add_done_callback(lambda done: self._refreshed(entry.key, done))

    def _refreshed(self, key: str, done: asyncio.Task[Any]) -> None:
        self._refreshing.pop(key, None)
        if not done.cancelled() and (error := done.exception()) is not None:
            log.warning("cannot refresh a value of the project's cache: %r", error)


@dataclass(frozen=True, slots=True)
class _Entry:
    """A key of `swr`, and how its value is loaded."""

    cache: ProjectCache
    key: str
    loader: Loader
    #: The pydantic model of the value, if it has one.
    model: Any

    def decoded(self, value: Any) -> Any:
        return value if self.model is None else self.model.model_validate(value)

    async def load(self) -> Any:
        """Call the loader, store its value and return it."""
        return await self.store(await self.loader())

    async def store(self, value: Any) -> Any:
        encoded = value if self.model is None else value.model_dump(mode="json")
        await self.cache.set(self.key, {"stored_at": time.time(), "value": encoded})
        return value


@dataclass(slots=True)
class SwrResult(sdk_cache.SWRResult[Any]):
    """A value, and whether it was `miss`, `fresh`, `stale` or `expired`."""

    value: Any
    status: sdk_cache.CacheStatus
    _entry: _Entry = field(repr=False)

    async def mutate(self, value: Any = _LOAD) -> Any:
        """Store this value; without one, load it again. Return it."""
        is_given = value is not _LOAD
        self.value = await (self._entry.store(value) if is_given else self._entry.load())
        return self.value
