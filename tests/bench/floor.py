"""The floor of `make bench`: the same graph called directly, with LangGraph's own Postgres saver.

No server, no queue, no events: a process, a connection, a graph. What a server adds to this is what
it costs. Run as a process of its own, so that its CPU is its own.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
import uuid

import psutil
from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver

from tests.bench.project.graphs import trivial


async def main(database_url: str, postmaster: int, seconds: float) -> None:
    async with AsyncPostgresSaver.from_conn_string(database_url) as saver:
        graph = trivial.copy({"checkpointer": saver})
        await _call(graph)
        begun, before = time.perf_counter(), _cpu_seconds(postmaster)
        count = 0
        while time.perf_counter() - begun < seconds:
            await _call(graph)
            count += 1
        taken = time.perf_counter() - begun
        cpu = _cpu_seconds(postmaster) - before
    print(json.dumps({"cpu_ms": cpu / count * 1000, "runs_per_second": count / taken}))


async def _call(graph) -> None:
    config = {"configurable": {"thread_id": str(uuid.uuid4())}}
    async for _ in graph.astream({"count": 1}, config, stream_mode=["values"], durability="async"):
        pass


def _cpu_seconds(postmaster: int) -> float:
    total = 0.0
    server = psutil.Process(postmaster)
    for process in (psutil.Process(os.getpid()), server, *server.children(recursive=True)):
        times = process.cpu_times()
        total += times.user + times.system
    return total


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])))
