"""How runs are answered: as JSON, as an event stream, as an outcome to wait for."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from typing import Any

from flask import Response, request

from belay_server.api.context import origins, parts
from belay_server.api.http.fields import query_flag
from belay_server.api.http.json_body import json_response
from belay_server.api.http.large_answers import large_answers
from belay_server.api.http.pages import shown
from belay_server.api.security.authentication import caller, watch_key
from belay_server.domain.run_options import RunOptions
from belay_server.domain.runs import RUN_FIELDS, Run
from belay_server.services.runs.stream import Follow, stream_events, wait_for_outcome
from belay_server.services.stream_clients import StreamClient, WatchClient

#: What libev calls a socket that can be read.
_READABLE = 1
STREAM_TYPE = "text/event-stream; charset=utf-8"
#: Documents of the answers that have no schema of their own.
EVENTS: dict[str, Any] = {
    "type": "object",
    "description": "One of the server-sent events; `data` is JSON, `id` is there to resume by",
    "properties": {name: {"type": "string"} for name in ("event", "data", "id")},
    "required": ["event", "data"],
}
OUTCOME: dict[str, Any] = {"description": "Whatever the graph's output is; an error, if it failed"}
NOTHING: dict[str, Any] = {"type": "object", "maxProperties": 0}
STREAM_HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}


def run_body(run: Run, fields: Sequence[str] = RUN_FIELDS) -> dict[str, Any]:
    return shown(run, fields)


def run_path(run: Run | Follow) -> str:
    return f"/threads/{run.thread_id}/runs/{run.run_id}"


def run_response(run: Run, location: str) -> Response:
    return json_response(run_body(run), headers={"content-location": location})


def stream_response(follow: Follow, location: str) -> Response:
    """Server-sent events. `location` is the run's own; the stream can be joined again below it."""
    headers = {
        **STREAM_HEADERS,
        "location": f"{run_path(follow)}/stream",
        "content-location": location,
    }
    body = stream_events(parts(), follow, stream_client())
    return Response(body, 200, headers, content_type=STREAM_TYPE)


def outcome_response(follow: Follow, location: str) -> Response:
    headers = {
        **STREAM_HEADERS,
        "location": f"{run_path(follow)}/join",
        "content-location": location,
    }
    body = wait_for_outcome(parts(), follow, stream_client())
    return Response(body, 200, headers, content_type="application/json")


def cancels_on_disconnect(options: RunOptions | None = None) -> bool:
    """Return whether the run is cancelled when this client disconnects: as its options say, or the
    query, in any of the spellings of the SDKs and the cancel guide.

    Raises Forbidden for a page of an origin that may not stop anything.
    """
    given = options.on_disconnect if options is not None else None
    cancels = (given or request.args.get("on_disconnect")) == "cancel" or query_flag(
        "cancel_on_disconnect", "cancel"
    )
    if cancels:
        origins().refuse_foreign_stop(request.headers)
    return cancels


def stream_client() -> StreamClient:
    """Return the client of this request's streamed response."""
    return StreamClient(_watch_client(), large_answers().share_of(request))


def _watch_client() -> WatchClient:
    """Watch this request's socket: it becomes readable, with nothing to read, when the client goes.

    Waiting for a write to fail would take until the next heartbeat, and then one more. A client
    whose API key is revoked is taken for one that leaves, though not for one that disconnected: its
    runs go on.
    """
    client_socket = request.environ.get("gunicorn.socket")
    found, who = parts(), caller()

    def watch(on_leave: Callable[[], None]) -> Callable[[], bool]:
        forget_key = watch_key(found, who, on_leave)
        stop_watching = None if client_socket is None else _watch(client_socket, on_leave)

        def stop() -> bool:
            forget_key()
            return stop_watching is not None and stop_watching()

        return stop

    return watch


def _watch(client_socket: Any, on_leave: Callable[[], None]) -> Callable[[], bool]:
    # Only a process with gunicorn's gevent worker has such a socket.
    import gevent  # noqa: PLC0415

    # A watcher of the event loop is a tenth of what a greenlet that waits would be.
    watcher = gevent.get_hub().loop.io(client_socket.fileno(), _READABLE)

    def look() -> None:
        watcher.stop()
        if _has_left(client_socket):
            on_leave()

    watcher.start(look)

    def stop() -> bool:
        watcher.stop()
        watcher.close()
        return _has_left(client_socket)

    return stop


def _has_left(client_socket: Any) -> bool:
    """Peek: nothing to read means closed; something means the next request, from one who stays."""
    try:
        # Of the socket below gevent's, which is told not to wait.
        return bool(client_socket._sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b"")
    except ConnectionError:
        return True
    except (BlockingIOError, InterruptedError):
        return False
    except (OSError, ValueError):
        return False  # we closed it ourselves: this server is stopping
