"""Test `langgraph_sdk.cache` on a real Redis server."""

from __future__ import annotations

import asyncio
import dataclasses
import uuid
from datetime import timedelta

import pytest
from langgraph_sdk import cache as sdk
from pydantic import BaseModel

from belay_server.bus.client import Keys, connect_redis
from belay_server.bus.project_cache import ProjectCache
from belay_server.configuration.settings import Settings

ALWAYS, DAY = timedelta(minutes=10), timedelta(days=1)


class Plan(BaseModel):
    name: str


class Loads:
    """A loader that returns 1, 2, …, or raises an error."""

    def __init__(self) -> None:
        self.count = 0
        self.error: Exception | None = None

    async def __call__(self):
        self.count += 1
        if self.error is not None:
            raise self.error
        return self.count


@pytest.fixture
def own_settings(valkey_url):
    prefix = f"{uuid.uuid4().hex}:"
    return Settings.from_environ(
        {"DATABASE_URL": "postgres://", "REDIS_URL": valkey_url, "BELAY_REDIS_PREFIX": prefix}
    )


@pytest.fixture
def cache(own_settings, monkeypatch):
    for name in ("_cache_get", "_cache_set", "_api_swr"):
        monkeypatch.setattr(sdk, name, None)
    made = ProjectCache(own_settings)
    made.install()
    return made


@pytest.fixture
def loads():
    return Loads()


async def tasks_done():
    await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}), return_exceptions=True)


@pytest.mark.parametrize("value", [None, 0, "ä", [1, {"a": None}], {"n": 1.5}])
def test_a_value_is_returned_as_it_was_stored(cache, value):
    async def scene():
        assert await sdk.cache_get("k") is None
        await sdk.cache_set("k", value)
        return await sdk.cache_get("k")

    assert asyncio.run(scene()) == value


def test_a_value_expires_after_a_day_at_most(cache, own_settings):
    async def scene():
        await sdk.cache_set("default", 1)
        await sdk.cache_set("zero", 1, ttl=timedelta(0))
        await sdk.cache_set("long", 1, ttl=timedelta(days=9))
        await sdk.cache_set("short", 1, ttl=timedelta(seconds=90))
        await sdk.cache_set("shortest", 1, ttl=timedelta(microseconds=1))

    asyncio.run(scene())
    with connect_redis(own_settings) as client:
        keys = Keys(own_settings.redis_prefix)
        left = {n: client.ttl(keys.cached(n)) for n in ("default", "zero", "long", "short")}
    day = 24 * 3600
    assert {name: day - 60 < seconds <= day for name, seconds in left.items()} == {
        "default": True,
        "zero": True,
        "long": True,
        "short": False,
    }
    assert 0 < left["short"] <= 90


def test_a_value_that_is_not_json_is_refused(cache):
    with pytest.raises(TypeError):
        asyncio.run(sdk.cache_set("k", object()))


def test_swr_loads_once_while_a_value_is_fresh(cache, loads):
    async def scene():
        return [await sdk.swr("k", loads, fresh_for=ALWAYS) for _ in range(3)]

    found = asyncio.run(scene())
    assert [(one.value, one.status) for one in found] == [(1, "miss"), (1, "fresh"), (1, "fresh")]
    assert isinstance(found[0], sdk.SWRResult)
    assert loads.count == 1


def test_swr_returns_a_stale_value_and_loads_another_in_the_background(cache, loads):
    async def scene():
        await sdk.swr("k", loads)
        stale = [await sdk.swr("k", loads) for _ in range(3)]
        await tasks_done()
        return stale, await sdk.swr("k", loads, fresh_for=ALWAYS)

    stale, then = asyncio.run(scene())
    assert [(one.value, one.status) for one in stale] == [(1, "stale")] * 3
    assert (then.value, then.status, loads.count) == (2, "fresh", 2)


def test_a_failed_load_in_the_background_keeps_the_stale_value(cache, loads, caplog):
    async def scene():
        await sdk.swr("k", loads)
        loads.error = RuntimeError("the service is down")
        await sdk.swr("k", loads)
        await tasks_done()
        return await sdk.swr("k", loads, fresh_for=ALWAYS)

    assert (asyncio.run(scene()).value, "the service is down" in caplog.text) == (1, True)


def test_swr_waits_for_the_loader_when_a_value_has_expired(cache, loads):
    async def scene():
        await sdk.swr("k", loads)
        return await sdk.swr("k", loads, max_age=timedelta(microseconds=1))

    found = asyncio.run(scene())
    assert (found.value, found.status) == (2, "expired")
    loads.error = RuntimeError("down")
    with pytest.raises(RuntimeError, match="down"):
        asyncio.run(sdk.swr("other", loads))


def test_a_value_can_be_replaced_or_loaded_again(cache, loads):
    async def scene():
        found = await sdk.swr("k", loads, fresh_for=DAY)
        assert (await found.mutate("mine"), found.value) == ("mine", "mine")
        assert (await sdk.swr("k", loads, fresh_for=DAY)).value == "mine"
        assert (await found.mutate(None), found.value) == (None, None)
        assert (await found.mutate(), found.value) == (2, 2)
        assert (await sdk.swr("k", loads, fresh_for=DAY)).value == 2

    asyncio.run(scene())


def test_a_model_is_stored_as_json_and_returned_as_a_model(cache):
    async def load():
        return Plan(name="gold")

    async def scene():
        return [await sdk.swr("k", load, fresh_for=DAY, model=Plan) for _ in range(2)]

    assert [one.value for one in asyncio.run(scene())] == [Plan(name="gold")] * 2


def test_the_keys_of_swr_are_its_own(cache, loads):
    async def scene():
        await sdk.cache_set("k", {"stored_at": 0, "value": "mine"})
        assert (await sdk.swr("k", loads, fresh_for=DAY)).status == "miss"
        return await sdk.cache_get("k")

    assert asyncio.run(scene()) == {"stored_at": 0, "value": "mine"}


def test_without_redis_every_key_is_missing(own_settings, loads, caplog):
    unreachable = dataclasses.replace(own_settings, redis_url="redis://127.0.0.1:1/0")
    cache = ProjectCache(unreachable)

    async def scene():
        await cache.set("k", 1)
        assert await cache.get("k") is None
        return await cache.swr("k", loads, fresh_for=DAY, max_age=DAY)

    found = asyncio.run(scene())
    assert (found.value, found.status) == (1, "miss")
    assert "cache" in caplog.text
