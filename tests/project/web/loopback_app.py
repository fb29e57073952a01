"""An ASGI app whose code calls the server that it is part of."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path

import httpx
from langgraph_sdk import get_client, get_sync_client
from langgraph_sdk.errors import APIStatusError
from starlette.applications import Starlette
from starlette.authentication import SimpleUser
from starlette.middleware import Middleware
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


class Marking:
    """Pure ASGI: marks each response, and sets a user, before Belay authenticates the request."""

    def __init__(self, app) -> None:
        self.app = app

    async def __call__(self, scope, receive, send):
        async def marked(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-marked", b"1")]
            await send(message)

        await self.app({**scope, "user": SimpleUser("mallory")}, receive, marked)


@contextlib.asynccontextmanager
async def lifespan(_app):
    task = asyncio.create_task(_schedule(Path(os.environ["TEST_SCHEDULED"])))
    yield
    task.cancel()


async def threads(_request):
    found = await client.threads.search(limit=1000)
    return JSONResponse([thread["metadata"]["owner"] for thread in found])


async def who(request):
    return JSONResponse([request.user.identity, request.user.is_authenticated])


def _search_in_a_thread() -> str:
    """Run where the context of the request is unknown, so without its caller's access."""
    try:
        get_sync_client().threads.search()
    except APIStatusError as error:
        return f"refused: {error.status_code}"
    return "found"


async def executor(_request):
    loop = asyncio.get_running_loop()
    found = await loop.run_in_executor(None, _search_in_a_thread)
    return JSONResponse([found, await asyncio.to_thread(_search_in_a_thread)])


calls: list[dict] = []


async def hook(request):
    if request.method == "POST":
        calls.append({"user": request.headers["authorization"], "body": await request.json()})
    return JSONResponse(calls)


app = Starlette(
    middleware=[Middleware(Marking)],
    lifespan=lifespan,
    routes=[
        Route("/mine/threads", threads),
        Route("/mine/who", who),
        Route("/mine/executor", executor),
        Route("/hooks/{name}", hook, methods=["GET", "POST"]),
    ],
)
