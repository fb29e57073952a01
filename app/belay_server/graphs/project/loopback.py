"""Clients of `langgraph_sdk` without a URL, in a project's code: they call the server that they
run in.

LangGraph's server connects them to its own process. Here they send HTTP requests to the web
process, at BELAY_INTERNAL_URL, with the headers that authenticate the calling code. The SDK has no
interface for this, so its functions are replaced before the project is imported.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import httpx
import langgraph_sdk
from langgraph.pregel import remote
from langgraph_sdk import client as sdk_clients
from langgraph_sdk._async import client as async_client
from langgraph_sdk._sync import client as sync_client
from langgraph_sdk.client import LangGraphClient, SyncLangGraphClient

from belay_server.runtime.per_loop import PerLoop

#: Authenticates the code of a run: `<run_id>.<token>`.
RUN_HEADER = "x-belay-run"
#: Authenticates the project's code in a web process.
SERVER_HEADER = "x-belay-server"
#: The URL of a client without one; its transport replaces it.
_NO_URL = "http://belay"
_CREDENTIALS = ("authorization", "cookie", "x-api-key")
_RETRIES = 2

Headers = Callable[[], Mapping[str, str]]


class Loopback:
    """Connects the SDK's clients without a URL to the server at `url`. `headers` returns those that
    authenticate the code that is calling."""

    def __init__(self, url: str, headers: Headers) -> None:
        self._url = httpx.URL(url)
        self._headers = headers
        self._connections = PerLoop(
            lambda: httpx.AsyncHTTPTransport(retries=_RETRIES),
            lambda transport: transport.aclose(),
        )

    def install(self) -> None:
        """Replace the SDK's functions, in this process."""
        # The SDK then does not look for LangGraph's server, and asks this for a transport.
        os.environ["__LANGGRAPH_DEFER_LOOPBACK_TRANSPORT"] = "true"
        _replace(async_client, "get_asgi_transport", lambda: self._asynchronous)
        _replace(async_client, "_registered_transports", _Nothing())
        original: Callable[..., SyncLangGraphClient] = _original(sync_client.get_sync_client)

        def get_sync_client(*, url: str | None = None, **options: Any) -> SyncLangGraphClient:
            if url is not None:
                return original(url=url, **options)
            made = original(url=_NO_URL, **options)
            made.http.client = httpx.Client(
                base_url=_NO_URL,
                transport=_Synchronous(self),
                timeout=made.http.client.timeout,
                headers=made.http.client.headers,
            )
            return SyncLangGraphClient(made.http.client)

        get_sync_client.original = original  # type: ignore[attr-defined]
        for module in (langgraph_sdk, sdk_clients, sync_client, remote):
            _replace(module, "get_sync_client", get_sync_client)
        _replace(remote.RemoteGraph, "_validate_client", _client_of)
        _replace(remote.RemoteGraph, "_validate_sync_client", _sync_client_of)

    def _asynchronous(self, **_options: Any) -> httpx.AsyncBaseTransport:
        return _Asynchronous(self, self._connections)

    def request(self, given: httpx.Request) -> httpx.Request:
        """Return a request to the server, with the caller's credentials or those of the code."""
        url = self._url.copy_with(raw_path=self._url.raw_path.rstrip(b"/") + given.url.raw_path)
        headers = given.headers.copy()
        headers["host"] = url.netloc.decode()
        if headers.get("x-api-key") in _keys_of_other_services():
            del headers["x-api-key"]
        if not any(name in headers for name in _CREDENTIALS):
            for name, value in self._headers().items():
                headers.setdefault(name, value)
        return httpx.Request(
            given.method, url, headers=headers, stream=given.stream, extensions=given.extensions
        )

    def unreachable(self, error: httpx.ConnectError) -> httpx.ConnectError:
        return httpx.ConnectError(
            f"cannot reach Belay's web process at {self._url} ({error}): set BELAY_INTERNAL_URL"
        )


class _Asynchronous(httpx.AsyncBaseTransport):
    def __init__(self, loopback: Loopback, connections: PerLoop[httpx.AsyncHTTPTransport]) -> None:
        self._loopback = loopback
        self._connections = connections

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        transport = await self._connections.get()
        try:
            return await transport.handle_async_request(self._loopback.request(request))
        except httpx.ConnectError as error:
            raise self._loopback.unreachable(error) from error


class _Synchronous(httpx.BaseTransport):
    def __init__(self, loopback: Loopback) -> None:
        self._loopback = loopback
        self._transport = httpx.HTTPTransport(retries=_RETRIES)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        try:
            return self._transport.handle_request(self._loopback.request(request))
        except httpx.ConnectError as error:
            raise self._loopback.unreachable(error) from error

    def close(self) -> None:
        self._transport.close()


class _Nothing:
    """The SDK's list of transports to be configured. These already are."""

    def append(self, transport: object) -> None:
        """Keep no reference: a node may make a client at each call."""


def _keys_of_other_services() -> frozenset[str | None]:
    """Return the API keys that the SDK takes from the environment, where they are for LangSmith."""
    names = (f"{service}_API_KEY" for service in ("LANGGRAPH", "LANGSMITH", "LANGCHAIN"))
    return frozenset(os.environ[name].strip().strip("\"'") for name in names if name in os.environ)


def _client_of(graph: remote.RemoteGraph) -> LangGraphClient:
    if graph.client is None:
        graph.client = async_client.get_client()
    return graph.client


def _sync_client_of(graph: remote.RemoteGraph) -> SyncLangGraphClient:
    if graph.sync_client is None:
        graph.sync_client = sync_client.get_sync_client()
    return graph.sync_client


def _original(function: Any) -> Any:
    return getattr(function, "original", function)


def _replace(owner: Any, name: str, value: Any) -> None:
    assert hasattr(owner, name), f"langgraph_sdk has no {name} any more"
    setattr(owner, name, value)
