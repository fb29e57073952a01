"""The scenarios of `make bench`: each sends load to a server and returns its figures.

They use only routes that every Agent Server has. Where a scenario counts work in a fixed time, a
slow server does less of it instead of taking longer.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from tests.bench.process_cost import MemoryPeak, ProcessTree

#: The measurements of a scenario, by the name of the table's row.
Figures = dict[str, float]


@dataclass
class Target:
    """A server under load, and the processes whose cost is measured."""

    url: str
    tree: ProcessTree
    #: A factor for the fixed times and counts below; lower for a quick run.
    scale: float = 1.0
    #: The processes of the worker alone, where they are known.
    worker: ProcessTree | None = None
    session: aiohttp.ClientSession = field(init=False)

    async def __aenter__(self) -> Target:
        self.session = aiohttp.ClientSession(
            self.url,
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=60),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.session.close()

    def times(self, count: int) -> int:
        return max(2, int(count * self.scale))

    async def post(self, path: str, **body: object) -> dict[str, Any]:
        async with self.session.post(path, json=body) as answer:
            answer.raise_for_status()
            found: dict[str, Any] = await answer.json()
            return found

    async def new_thread(self) -> str:
        thread_id: str = (await self.post("/threads"))["thread_id"]
        return thread_id

    async def wait(self, thread_id: str | None = None, graph: str = "trivial") -> None:
        at = f"/threads/{thread_id}" if thread_id else ""
        values = await self.post(f"{at}/runs/wait", assistant_id=graph, input={"count": 1})
        assert "count" in values, values


def milliseconds(values: list[float], percent: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))] * 1000


async def timed(work: Callable[[], Awaitable[object]]) -> float:
    begun = time.perf_counter()
    await work()
    return time.perf_counter() - begun


async def in_parallel(clients: int, count: int, work: Callable[[int], Awaitable[object]]) -> float:
    """Make `count` calls, `clients` at a time; return the seconds they took."""
    numbers = iter(range(count))

    async def client() -> None:
        for number in numbers:
            await work(number)

    begun = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return time.perf_counter() - begun


async def per_second(clients: int, seconds: float, work: Callable[[], Awaitable[object]]) -> float:
    """Return the calls per second of `clients` that each make one call after the other."""
    begun = time.perf_counter()
    done = 0

    async def client() -> None:
        nonlocal done
        while time.perf_counter() - begun < seconds:
            await work()
            done += 1

    await asyncio.gather(*(client() for _ in range(clients)))
    return done / (time.perf_counter() - begun)


# --- runs ---------------------------------------------------------------------------------------


async def one_at_a_time(target: Target) -> Figures:
    taken = [await timed(target.wait) for _ in range(target.times(100))]
    return {"create + wait, one at a time, p50": milliseconds(taken, 50)}


async def many_clients(target: Target) -> Figures:
    before = target.tree.cpu_seconds()
    seconds = 10 * target.scale
    rate = await per_second(32, seconds, target.wait)
    cpu = target.tree.cpu_seconds() - before
    return {
        "create + wait, 32 clients": rate,
        "CPU of a trivial run, whole tree": cpu / (rate * seconds) * 1000,
    }


async def threads_of_many_clients(target: Target) -> Figures:
    async def thread_and_run() -> None:
        await target.wait(await target.new_thread())

    return {
        "thread + run + wait, 32 clients": await per_second(32, 10 * target.scale, thread_and_run)
    }


async def in_background(target: Target) -> Figures:
    count = target.times(1000)
    threads = [await target.new_thread() for _ in range(count)]

    async def enqueue(number: int) -> None:
        path = f"/threads/{threads[number]}/runs"
        await target.post(path, assistant_id="trivial", input={"count": 1})

    begun = time.perf_counter()
    enqueued = await in_parallel(32, count, enqueue)
    while await target.post("/threads/search", status="busy", limit=1):
        await asyncio.sleep(0.05)
    return {
        "1,000 background runs, enqueued": count / enqueued,
        "1,000 background runs, drained": count / (time.perf_counter() - begun),
    }


async def sleeping(target: Target) -> Figures:
    count = target.times(300)
    with MemoryPeak(target.tree) as peak:
        seconds = await in_parallel(count, count, lambda _: target.wait(graph="sleeper"))
    return {
        "300 runs that sleep 2 s": seconds,
        "300 runs that sleep 2 s, memory": peak.bytes / 1e6,
    }


async def thousand(target: Target) -> Figures:
    """Have a thousand runs sleep at once, then stop them by one call."""
    assert target.worker is not None
    count = target.times(1000)
    waiting: dict[str, str] = {}

    async def start(_: int) -> None:
        thread_id = await target.new_thread()
        body = {"assistant_id": "idler", "input": {"seconds": 600}}
        waiting[(await target.post(f"/threads/{thread_id}/runs", **body))["run_id"]] = thread_id

    async def look(run_id: str) -> None:
        async with target.session.get(f"/threads/{waiting[run_id]}/runs/{run_id}") as answer:
            if (await answer.json())["status"] == "running":
                del waiting[run_id]

    await in_parallel(32, count, start)
    while runs := list(waiting):
        await in_parallel(32, len(runs), lambda number: look(runs[number]))
    await asyncio.sleep(2)
    memory = target.worker.memory() / 1e6
    begun = time.perf_counter()
    async with target.session.post("/runs/cancel", json={"status": "running"}) as answer:
        answer.raise_for_status()
    while await target.post("/threads/search", status="busy", limit=1):
        await asyncio.sleep(0.01)
    return {
        "1,000 runs that sleep, worker": memory,
        "1,000 running runs stopped by one call": time.perf_counter() - begun,
    }


async def growing_thread(target: Target) -> Figures:
    """Return the cost of a run by its number on its thread, as a median of neighbours."""
    thread_id = await target.new_thread()
    count = target.times(1010)
    taken = [await timed(lambda: target.wait(thread_id)) for _ in range(count)]

    def around(number: int) -> float:
        number = int(number * target.scale)
        return statistics.median(taken[max(0, number - 10) : number + 10])

    fifth = statistics.median(taken[2:12])
    return {
        "150th run of a thread, to the 5th": around(150) / fifth,
        "1,000th run of a thread, to the 5th": around(1000) / fifth,
    }


# --- streams ------------------------------------------------------------------------------------


async def first_event(target: Target) -> Figures:
    async def until_first() -> float:
        begun = time.perf_counter()
        body = {"assistant_id": "trivial", "input": {"count": 1}}
        async with target.session.post("/runs/stream", json=body) as answer:
            async for line in answer.content:
                if line.startswith(b"event:"):
                    first = time.perf_counter() - begun
                    break
            await answer.read()
        return first

    taken = [await until_first() for _ in range(target.times(100))]
    return {
        "first event, p50": milliseconds(taken, 50),
        "first event, p99": milliseconds(taken, 99),
    }


async def token_streams(target: Target) -> Figures:
    firsts: list[float] = []
    events = 0

    async def follow(_: int) -> None:
        nonlocal events
        begun = time.perf_counter()
        body = {
            "assistant_id": "talker",
            "input": {"messages": [{"role": "user", "content": "talk"}]},
            "stream_mode": ["messages-tuple"],
        }
        seen = 0
        async with target.session.post("/runs/stream", json=body) as answer:
            async for line in answer.content:
                if line.startswith(b"event:"):
                    if not seen:
                        firsts.append(time.perf_counter() - begun)
                    seen += 1
        assert seen > 200, f"a stream of 200 tokens had {seen} events"
        events += seen

    seconds = await in_parallel(50, 50, follow)
    return {
        "50 streams of 200 tokens": events / seconds,
        "50 streams of 200 tokens, first event p50": milliseconds(firsts, 50),
    }


async def idle_listeners(target: Target) -> Figures:
    """Return the memory of the whole tree per additional listener."""
    thread_id = await target.new_thread()
    body = {"assistant_id": "idler", "input": {"seconds": 600}, "stream_mode": ["values"]}
    run = await target.post(f"/threads/{thread_id}/runs", **body)
    path = f"/threads/{thread_id}/runs/{run['run_id']}"
    answers: list[aiohttp.ClientResponse] = []

    async def listen(_: int) -> None:
        answers.append(await target.session.get(f"{path}/stream"))

    figures: Figures = {}
    await in_parallel(10, 50, listen)  # exclude the cost of one-time setup
    await asyncio.sleep(2)
    before = target.tree.memory()
    for count in (500, 2000, 5000):
        await in_parallel(50, target.times(count) - (len(answers) - 50), listen)
        await asyncio.sleep(2)
        grown = target.tree.memory() - before
        figures[f"{count:,} idle listeners, each"] = grown / (len(answers) - 50) / 1000
    for answer in answers:
        answer.close()
    async with target.session.post(f"{path}/cancel", params={"wait": "1"}):
        pass
    return figures


SCENARIOS: dict[str, Callable[[Target], Awaitable[Figures]]] = {
    "one": one_at_a_time,
    "many": many_clients,
    "threads": threads_of_many_clients,
    "background": in_background,
    "sleeping": sleeping,
    "thousand": thousand,
    "first": first_event,
    "tokens": token_streams,
    "listeners": idle_listeners,
    "growing": growing_thread,
}
