"""An ASGI app with a lifespan, as in existing LangGraph projects."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import os
import sys
import threading
import time
from pathlib import Path

from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route

log = logging.getLogger(__name__)
#: A thread waits for it from the start, as that of a logging library does.
records = multiprocessing.SimpleQueue()
received = []
threading.Thread(target=lambda: received.append(records.get()), daemon=True).start()
left = []
came = {"slow": 0, "blocking": 0, "work": 0}


@contextlib.asynccontextmanager
async def lifespan(_app):
    yield {"opened": "at the start"}
    if path := os.environ.get("TEST_LIFESPAN_END"):
        Path(path).write_text("ended")


async def hello(request):
    log.warning("hello was asked")
    return JSONResponse(
        {
            "name": request.path_params["name"],
            "opened": request.state.opened,
            "request_id": request.headers["x-request-id"],
            "loop": asyncio.get_running_loop() is not None,
        }
    )


async def echo(request):
    body = await request.body()
    return PlainTextResponse(f"{request.method} {len(body)} {request.url.query}")


async def slow(_request):
    """Wait until ten requests are here at once."""
    came["slow"] += 1
    while came["slow"] < 10:
        await asyncio.sleep(0.01)
    return PlainTextResponse("slow")


async def record(_request):
    """Return what the thread receives from the queue."""
    records.put("a record")
    while not received:
        await asyncio.sleep(0.01)
    return PlainTextResponse(received[0])


def blocking(_request):
    came["blocking"] += 1
    while came["blocking"] < 10:
        time.sleep(0.01)
    return PlainTextResponse("blocking")


async def spin(request):
    """Block the event loop, as no handler should, until the folder has the file `over`."""
    folder = Path(request.query_params["folder"])
    (folder / "begun").touch()
    end = time.monotonic() + 60
    while time.monotonic() < end and not (folder / "over").exists():
        pass
    return PlainTextResponse("spun")


async def stream(_request):
    async def beats():
        try:
            for number in range(1000):
                yield f"data: {number}\n\n"
                await asyncio.sleep(0.1)
        finally:
            left.append(threading.get_native_id())

    return StreamingResponse(beats(), media_type="text/event-stream")


async def quiet_stream(_request):
    """Stream one event, and no more."""

    async def beats():
        try:
            yield "data: 0\n\n"
            await asyncio.sleep(3600)
        finally:
            left.append(threading.get_native_id())

    return StreamingResponse(beats(), media_type="text/event-stream")


async def work(request):
    """Go on without the client, as with uvicorn, and respond."""
    came["work"] += 1
    while not await request.is_disconnected():
        await asyncio.sleep(0.01)
    left.append(threading.get_native_id())
    after = BackgroundTask(left.append, threading.get_native_id())
    return PlainTextResponse("done", background=after)


async def in_background(request):
    """Respond, and work for a moment longer."""

    async def more():
        await asyncio.sleep(0.3)
        left.append(threading.get_native_id())

    status = int(request.query_params["status"])
    text = "" if status == 204 else "done"
    return PlainTextResponse(text, status_code=status, background=BackgroundTask(more))


class NoResponse:
    """An ASGI app that returns before its response is complete."""

    async def __call__(self, scope, receive, send):
        if scope["query_string"] == b"part":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"part", "more_body": True})


async def how_many_came(_request):
    return JSONResponse(came["work"])


async def how_many_left(_request):
    return JSONResponse(len(left))


async def info(_request):
    return JSONResponse({"mine": True})


async def broken(_request):
    raise RuntimeError("broken on purpose")


async def pid(_request):
    return JSONResponse(os.getpid())


async def exits(_request):
    sys.exit(3)


app = Starlette(
    lifespan=lifespan,
    routes=[
        Route("/hello/{name}", hello),
        Route("/echo", echo, methods=["POST"]),
        Route("/slow", slow),
        Route("/record", record),
        Route("/blocking", blocking),
        Route("/spin", spin),
        Route("/beats", stream),
        Route("/quiet", quiet_stream, methods=["GET", "POST"]),
        Route("/work", work, methods=["GET", "POST"]),
        Route("/came", how_many_came),
        Route("/background", in_background),
        Route("/silent", NoResponse()),
        Route("/left", how_many_left),
        Route("/info", info),
        Route("/threads", info, methods=["PATCH"]),
        Route("/broken", broken),
        Route("/exits", exits),
        Route("/pid", pid),
    ],
)


async def cannot_start(scope, receive, send):
    await receive()
    await send({"type": "lifespan.startup.failed", "message": "no database"})


async def bare(scope, receive, send):
    """An ASGI app without a routing table, a lifespan or error handling."""
    if scope["type"] != "http":
        raise NotImplementedError(scope["type"])
    if scope["path"] == "/bare/broken":
        raise RuntimeError("broken before it answered")
    await send({"type": "http.response.start", "status": 418, "headers": []})
    await send({"type": "http.response.body", "body": b"bare"})
