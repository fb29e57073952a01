"""Graphs whose nodes call the server that they run in, with clients that have no URL."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from pathlib import Path
from typing import Any, TypedDict

import httpx
from langgraph.config import get_store
from langgraph.graph import START, StateGraph
from langgraph.pregel.remote import RemoteGraph
from langgraph_sdk import get_client, get_sync_client
from langgraph_sdk.errors import APIStatusError

from .simple import Count

#: Made at import, before there is a run or an event loop.
client = get_client()
sync_client = get_sync_client()


class Call(TypedDict, total=False):
    thread_id: str
    note: str


async def _call(state: Call) -> Call:
    thread = await client.threads.create(metadata={"made_by": "a node"})
    values = await get_client().runs.wait(thread["thread_id"], "counter", input={"count": 1})
    streamed = [
        part.event async for part in client.runs.stream(None, "counter", input={"count": 1})
    ]
    (run,) = await client.runs.list(thread["thread_id"])
    told = {"values": values, "parent": run["metadata"].get("parent_run_id"), "events": streamed}
    told["remote"] = await RemoteGraph("counter").ainvoke({"count": 1})
    told["owner"] = thread["metadata"].get("owner")
    if "thread_id" in state:
        try:
            await client.threads.get(state["thread_id"])
        except APIStatusError as error:
            told["refused"] = error.status_code
    return {"note": json.dumps(told)}


def _call_sync(state: Call) -> Call:
    thread = sync_client.threads.create()
    values = get_sync_client().runs.wait(thread["thread_id"], "counter", input={"count": 1})
    (run,) = sync_client.runs.list(thread["thread_id"])
    told: dict[str, Any] = {"values": values, "parent": run["metadata"].get("parent_run_id")}
    told["remote"] = RemoteGraph("counter").invoke({"count": 1})
    told["owner"] = thread["metadata"].get("owner")
    return {"note": json.dumps(told)}


async def _tell(state: Count) -> Count:
    """Return the headers that a request of this node has."""
    shown: dict[str, str] = {}

    async def note(request: httpx.Request) -> None:
        shown.update(request.headers)

    transport = client.http.client._transport
    request = transport._loopback.request(httpx.Request("GET", "http://belay/ok"))
    await note(request)
    return {"note": json.dumps(shown)}


def _leave_a_thread(state: Count) -> Count:
    """Start a thread that goes on after the run, and note what it may see."""
    seen = state["note"]
    store = get_store()

    def look() -> None:
        for _ in range(600):
            try:
                store.put(("left", "behind"), "item", {})
                stored = ""
            except RuntimeError:
                stored = "store-refused\n"
            try:
                owners = {t["metadata"]["owner"] for t in sync_client.threads.search(limit=1000)}
            except APIStatusError as error:
                owners = {str(error.status_code)}
            with Path(seen).open("a") as file:
                file.write("".join(f"{owner}\n" for owner in owners) + stored)
            time.sleep(0.05)

    threading.Thread(target=look, daemon=True).start()
    return {}


async def _call_until_refused(state: Count) -> Count:
    """Call the server until it refuses, write a line for each call, and return the refusal."""
    while True:
        try:
            await client.assistants.count()
        except APIStatusError as error:
            return {"note": f"{error.status_code} {error}"}
        with Path(state["note"]).open("a") as file:
            file.write("called\n")
        await asyncio.sleep(0.05)


leaves = StateGraph(Count).add_node("leave", _leave_a_thread).add_edge(START, "leave").compile()
calls = StateGraph(Call).add_node("call", _call).add_edge(START, "call").compile()
calls_sync = StateGraph(Call).add_node("call", _call_sync).add_edge(START, "call").compile()
tells = StateGraph(Count).add_node("tell", _tell).add_edge(START, "tell").compile()
refused = StateGraph(Count).add_node("call", _call_until_refused).add_edge(START, "call").compile()
