"""An ASGI app whose code calls the server that it is part of."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path

import httpx
from langgraph_sdk import get_client
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

client = get_client()


async def _schedule(path: Path) -> None:
    """Create a thread as soon as the server responds, as a scheduler would."""
    while True:
        with contextlib.suppress(httpx.HTTPError):
            thread = await client.threads.create(metadata={"owner": "ann", "by": "a scheduler"})
            path.write_text(thread["thread_id"])
            return
        await asyncio.sleep(0.1)


@contextlib.asynccontextmanager
async def lifespan(_app):
    task = asyncio.create_task(_schedule(Path(os.environ["TEST_SCHEDULED"])))
    yield
    task.cancel()


async def threads(_request):
    found = await client.threads.search(limit=1000)
    return JSONResponse([thread["metadata"]["owner"] for thread in found])


calls: list[dict] = []


async def hook(request):
    if request.method == "POST":
        calls.append({"user": request.headers["authorization"], "body": await request.json()})
    return JSONResponse(calls)


app = Starlette(
    lifespan=lifespan,
    routes=[
        Route("/mine/threads", threads),
        Route("/hooks/{name}", hook, methods=["GET", "POST"]),
    ],
)
