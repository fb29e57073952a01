"""Graphs that factories make for the user and the use. Each call is recorded in the store."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from langchain_core.runnables import RunnableConfig
from langgraph.graph import START, StateGraph
from langgraph.runtime import Runtime
from langgraph_sdk import get_sync_client
from langgraph_sdk.cache import cache_get, cache_set
from langgraph_sdk.runtime import ServerRuntime

from .simple import Count


@dataclass
class Voice:
    voice: str = "plain"


def _graph(kind: str, runtime: ServerRuntime[Voice]) -> Any:
    running = runtime.execution_runtime
    user = runtime.ensure_user()
    voice = running.context.voice if running and running.context else None

    def say(state: Count, config: RunnableConfig, runtime: Runtime[Voice]) -> Count:
        calls = runtime.store.search((kind, user.identity))
        node_user = config["configurable"]["langgraph_auth_user"]
        server_user = runtime.server_info.user
        told = {
            "calls": sorted(item.key for item in calls),
            "user": [user.identity, user["plan"], user.is_authenticated],
            "node": [
                node_user.identity,
                node_user["plan"],
                node_user.get("none"),
                server_user.plan,
            ],
            "voice": voice,
        }
        return {"note": json.dumps(told)}

    return StateGraph(Count, context_schema=Voice).add_node("say", say).add_edge(START, "say")


def make_sync(config: dict[str, Any], runtime: ServerRuntime[Voice]) -> Any:
    assert config["configurable"] is not None
    user = runtime.ensure_user()
    runtime.store.put(("sync", user.identity), runtime.access_context, {"called": True})
    return _graph("sync", runtime)


@asynccontextmanager
async def make_async(runtime: ServerRuntime[Voice]) -> AsyncIterator[Any]:
    user = runtime.ensure_user()
    await cache_set(f"for_users:{user.identity}", {"called": runtime.access_context})
    assert await cache_get(f"for_users:{user.identity}") == {"called": runtime.access_context}
    await runtime.store.aput(("async", user.identity), runtime.access_context, {"called": True})
    yield _graph("async", runtime)


def make_calling(runtime: ServerRuntime[Voice]) -> Any:
    """Record whose threads the code of the factory sees."""
    user = runtime.ensure_user()
    threads = get_sync_client().threads.search(limit=1000)
    owners = sorted({thread["metadata"]["owner"] for thread in threads})
    runtime.store.put(("calling", user.identity), runtime.access_context, {"owners": owners})

    def say(state: Count, runtime: Runtime[Voice]) -> Count:
        items = runtime.store.search(("calling", user.identity))
        return {"note": json.dumps({item.key: item.value["owners"] for item in items})}

    return StateGraph(Count).add_node("say", say).add_edge(START, "say")


def make_exiting(runtime: ServerRuntime[Voice]) -> Any:
    """End the process, except where a run is executed."""
    if runtime.execution_runtime is None:
        raise SystemExit(1)
    return StateGraph(Count).add_node("n", lambda state: {"note": "ran"}).add_edge(START, "n")
