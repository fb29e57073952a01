"""An ASGI app whose middleware sees, changes and answers every request of the server."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from starlette.applications import Starlette
from starlette.authentication import AuthCredentials, SimpleUser, UnauthenticatedUser
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route

done: list[str] = []


class Counting:
    """Pure ASGI: adds a header for each time that it has wrapped a response."""

    def __init__(self, app, name: str) -> None:
        self.app = app
        self.name = name.encode()

    async def __call__(self, scope, receive, send):
        async def counted(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (self.name, b"1")]
            await send(message)

        scope["headers"] = [*scope["headers"], (b"x-team", b"by the middleware")]
        await self.app(scope, receive, counted)


class Users:
    """Pure ASGI: sets the user whom a header names, as AuthenticationMiddleware does."""

    def __init__(self, app) -> None:
        self.app = app

    async def __call__(self, scope, receive, send):
        name = dict(scope["headers"]).get(b"x-user", b"").decode()
        if name:
            user = UnauthenticatedUser() if name == "nobody" else SimpleUser(name)
            scope = {**scope, "user": user, "auth": AuthCredentials(["paint"])}
        await self.app(scope, receive, send)


class Sockets:
    """Pure ASGI: refuses WebSockets, answers instead of Belay, or changes what is sent on them."""

    def __init__(self, app) -> None:
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] != "websocket":
            await self.app(scope, receive, send)
            return
        told = dict(scope["headers"]).get(b"x-socket", b"")
        if told == b"refuse":
            await send({"type": "websocket.close", "code": 4000})
        elif told == b"instead":
            await receive()
            await send({"type": "websocket.accept"})
            message = await receive()
            await send({"type": "websocket.send", "text": f"middleware: {message['text']}"})
            await send({"type": "websocket.close", "code": 4001, "reason": "enough"})
        elif told == b"raise":
            raise RuntimeError("the middleware is broken")
        elif told == b"raise later":
            await self.app(scope, receive, self.raising(send))
        else:
            await self.app(scope, receive, self.signing(send) if told == b"sign" else send)

    def signing(self, send):
        async def signed(message):
            if message["type"] == "websocket.send":
                document = {**json.loads(message["text"]), "signed": True}
                message = {**message, "text": json.dumps(document)}
            await send(message)

        return signed

    def raising(self, send):
        async def raised(message):
            if message["type"] == "websocket.send":
                raise RuntimeError("the middleware is broken")
            await send(message)

        return raised


class Rewriting:
    """Pure ASGI: adds to the input of a request's body."""

    def __init__(self, app) -> None:
        self.app = app

    async def __call__(self, scope, receive, send):
        if (b"x-rewrite", b"yes") not in scope["headers"]:
            await self.app(scope, receive, send)
            return
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        document = json.loads(body)
        document["input"]["count"] += 1000
        rewritten = [json.dumps(document).encode()]

        async def replay():
            if rewritten:
                return {"type": "http.request", "body": rewritten.pop(), "more_body": False}
            return await receive()

        await self.app(scope, replay, send)


async def answer(request: Request, call_next):
    """Through BaseHTTPMiddleware, which wraps the body and the response."""
    if request.headers.get("x-answer") == "instead":
        return JSONResponse({"by": "the middleware"}, status_code=418)
    if request.headers.get("x-answer") == "raise":
        raise RuntimeError("the middleware is broken")
    if request.headers.get("x-answer") == "cancel":
        raise asyncio.CancelledError
    if request.headers.get("x-answer") == "exit":
        sys.exit(1)
    if request.headers.get("x-answer") == "body":
        await request.body()
    request.state.tenant = "of the middleware"
    response = await call_next(request)
    response.headers["x-path"] = request.url.path
    if request.headers.get("x-answer") == "line break":
        response.raw_headers.append((b"x-more", b"one\r\nx-forged: two"))
    return response


async def work() -> None:
    await asyncio.sleep(0.2)
    done.append("worked")


async def hello(_request):
    return PlainTextResponse("hello", background=BackgroundTask(work))


async def who(request):
    seen = [request.user.display_name, request.user.is_authenticated, list(request.auth.scopes)]
    return JSONResponse([*seen, request.state.tenant])


async def refuse(_request):
    raise HTTPException(409, "by a route")


async def worked(_request):
    return JSONResponse(done)


async def follow(request):
    """Stream a part when a file exists. The headers do not wait for it."""

    async def parts():
        while not Path(request.query_params["file"]).exists():
            await asyncio.sleep(0.02)
        yield "a part"

    return StreamingResponse(parts())


app = Starlette(
    routes=[
        Route("/hello", hello),
        Route("/refuse", refuse),
        Route("/who", who),
        Route("/worked", worked),
        Route("/follow", follow),
    ],
    middleware=[
        Middleware(CORSMiddleware, allow_origins=["https://ui.example"]),
        Middleware(Counting, name="x-counted"),
        Middleware(BaseHTTPMiddleware, dispatch=answer),
        Middleware(Rewriting),
        Middleware(Sockets),
        Middleware(Users),
    ],
)
