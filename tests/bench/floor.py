"""The floor of `make bench`: the same graph called directly, with LangGraph's own Postgres saver or
without one.

There is no server, queue or event log, only a process, a connection and a graph. The difference to
this is the cost of a server. It is a separate process, so that only its own CPU time is counted.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
import uuid
from contextlib import AsyncExitStack

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver
from langgraph.graph.state import CompiledStateGraph
from langgraph.types import Durability

from tests.bench.project.graphs import State, trivial


async def main(database_url: str, seconds: float) -> None:
    """Measure for so many seconds. Without a URL, the graph saves nothing."""
    async with AsyncExitStack() as stack:
        graph = trivial
        if database_url:
            opened = AsyncPostgresSaver.from_conn_string(database_url)
            graph = trivial.copy({"checkpointer": await stack.enter_async_context(opened)})
        await _call(graph)
        begun, before = time.perf_counter(), time.process_time()
        runs = 0
        while time.perf_counter() - begun < seconds:
            await _call(graph)
            runs += 1
        taken = time.perf_counter() - begun
    print(json.dumps({"cpu": time.process_time() - before, "runs": runs, "seconds": taken}))


async def _call(graph: CompiledStateGraph[State, None, State, State]) -> None:
    config: RunnableConfig = {"configurable": {"thread_id": str(uuid.uuid4())}}
    durability: Durability | None = "async" if graph.checkpointer else None
    stream = graph.astream({"count": 1}, config, stream_mode=["values"], durability=durability)
    async for _ in stream:
        pass


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], float(sys.argv[2])))
