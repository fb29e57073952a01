"""Check every response against the OpenAPI document of its server.

`watched(client)` does so for one client of httpx or the SDK. Bodies are collected as they pass and
checked at their end, so that a stream stays a stream. A response that does not match raises
AssertionError where its body is read.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, TypeVar

import httpx
import jsonschema_rs

_Client = TypeVar("_Client")
#: The framework serves these paths. They have no operation in the document.
#: `http.mount_prefix` of one of the tests' projects.
MOUNTED = "/agents/v1"
_UNDOCUMENTED_PATHS = re.compile(r"/openapi\.json|/docs(/.*)?")
_NOT_FOUND = {"detail": "Not Found"}
_NOT_ALLOWED = {"detail": "Method Not Allowed"}
#: The agent runs API has its own error envelope and statuses, even for unknown paths below it.
_AGENT_PATHS = re.compile(r"/agent(/.*)?")
_NO_AGENT_ROUTE = {404: "NOT_FOUND", 400: "INVALID_REQUEST"}


def watched(client: _Client) -> _Client:
    """Return the same client of httpx or the SDK, with its responses checked from now on."""
    http: Any = client
    while not isinstance(http, (httpx.Client, httpx.AsyncClient)):
        http = http.http.client if hasattr(http, "http") else http.client
    # Load the document now, so that the first request does not wait for it.
    _document_of(str(http.base_url).rstrip("/"))
    hook = _watch_async if isinstance(http, httpx.AsyncClient) else _watch
    http.event_hooks = {**http.event_hooks, "response": [*http.event_hooks["response"], hook]}
    return client


def _watch(response: httpx.Response) -> None:
    check = _head_checked(response)
    if check is not None:
        response.stream = _Watched(response.stream, check)


async def _watch_async(response: httpx.Response) -> None:
    check = _head_checked(response)
    if check is not None:
        response.stream = _WatchedAsync(response.stream, check)


@dataclass
class _Watched(httpx.SyncByteStream):
    inner: Any
    check: Callable[[bytes], None]

    def __iter__(self) -> Iterator[bytes]:
        body = bytearray()
        for chunk in self.inner:
            body += chunk
            yield chunk
        self.check(bytes(body))

    def close(self) -> None:
        self.inner.close()


@dataclass
class _WatchedAsync(httpx.AsyncByteStream):
    inner: Any
    check: Callable[[bytes], None]

    async def __aiter__(self) -> AsyncIterator[bytes]:
        body = bytearray()
        async for chunk in self.inner:
            body += chunk
            yield chunk
        self.check(bytes(body))

    async def aclose(self) -> None:
        await self.inner.aclose()


class _Body:
    """A schema, compiled at its first use: most of a document's schemas are never used."""

    def __init__(self, schema: dict[str, Any]) -> None:
        self._schema = schema

    @cached_property
    def validator(self) -> jsonschema_rs.Validator:
        return jsonschema_rs.Draft202012Validator(self._schema, validate_formats=True)


@dataclass(frozen=True)
class _Operation:
    """A method and a path, with the bodies of each status by media type."""

    name: str
    path: re.Pattern[str]
    #: None is a response without a body.
    answers: dict[int, dict[str, _Body] | None]


class _Document:
    def __init__(self, document: dict[str, Any]) -> None:
        self._components = document.get("components", {})
        self._operations = [
            self._operation(method.upper(), path, operation)
            # Paths with fewer parameters come first: /runs/crons before /runs/{run_id}.
            for path, methods in sorted(document["paths"].items(), key=lambda item: _order(item[0]))
            for method, operation in methods.items()
            if method != "parameters"
        ]

    def _operation(self, method: str, path: str, operation: dict[str, Any]) -> _Operation:
        pattern = re.escape(path).replace(r"\{namespace\}", ".+")
        pattern = re.sub(r"\\\{\w+\\\}", "[^/]*", pattern)
        answers = {
            int(status): self._media(answer) for status, answer in operation["responses"].items()
        }
        return _Operation(f"{method} {path}", re.compile(pattern + "/?"), answers)

    def _media(self, answer: dict[str, Any]) -> dict[str, _Body] | None:
        content = answer.get("content")
        return content and {
            kind: _Body({"components": self._components, **media["schema"]})
            for kind, media in content.items()
        }

    def find(self, method: str, path: str) -> _Operation | None:
        for operation in self._operations:
            if operation.name.startswith(method + " ") and operation.path.fullmatch(path):
                return operation
        return None


def _order(path: str) -> tuple[int, str]:
    return path.count("{"), path


@cache
def _document_of(origin: str) -> _Document:
    return _Document(httpx.get(f"{origin}/openapi.json").json())


def _head_checked(response: httpx.Response) -> Callable[[bytes], None] | None:
    """Check status and content type. Return the check of the body, or None if there is none."""
    request = response.request
    path = request.url.raw_path.decode().partition("?")[0]
    prefix = MOUNTED if path.startswith(MOUNTED) else ""
    path = path.removeprefix(prefix) or "/"
    if request.method in ("HEAD", "OPTIONS") or _UNDOCUMENTED_PATHS.fullmatch(path):
        return None
    origin = f"{request.url.scheme}://{request.url.netloc.decode()}{prefix}"
    operation = _document_of(origin).find(request.method, path)
    if operation is None:
        name = f"{request.method} {path}"
        if _AGENT_PATHS.fullmatch(path):
            kind = _NO_AGENT_ROUTE.get(response.status_code)
            return lambda body: _assert_no_agent_route(name, kind, body)
        assert response.status_code in (404, 405), f"{name} is undocumented: {response.status_code}"
        expected = _NOT_FOUND if response.status_code == 404 else _NOT_ALLOWED
        return lambda body: _assert_no_route(name, body, expected)
    name = f"{operation.name}: {response.status_code}"
    assert response.status_code in operation.answers, f"{name} is undocumented"
    media = operation.answers[response.status_code]
    if media is None:
        return lambda body: _assert_empty(name, body)
    kind = response.headers.get("content-type", "").partition(";")[0]
    assert kind in media, f"{name} is {kind!r}, not one of {list(media)}"
    if kind != "application/json":
        return None
    return lambda body: _assert_valid(name, media[kind].validator, body)


def _assert_no_route(name: str, body: bytes, expected: dict[str, str]) -> None:
    assert json.loads(body) == expected, f"{name} is undocumented: {body[:200]!r}"


def _assert_no_agent_route(name: str, kind: str | None, body: bytes) -> None:
    error = json.loads(body).get("error", {})
    found = kind is not None and (error.get("type"), error.get("code")) == (kind, "INVALID_REQUEST")
    assert found, f"{name} is undocumented: {body[:200]!r}"


def _assert_empty(name: str, body: bytes) -> None:
    assert body == b"", f"{name} is documented without a body: {body[:200]!r}"


def _assert_valid(name: str, validator: jsonschema_rs.Validator, body: bytes) -> None:
    error = next(iter(validator.iter_errors(json.loads(body))), None)
    if error is not None:
        where = "/".join(map(str, error.instance_path))
        raise AssertionError(f"{name} at {where!r}: {error.message[:500]}")
