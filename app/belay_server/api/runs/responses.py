"""Build the responses for runs: JSON, an event stream, or an outcome to wait for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from uuid import UUID

from flask import Response, request

from belay_server.api.context import context, parts
from belay_server.api.http.bodies.json_body import json_response
from belay_server.api.http.bodies.large_answers import large_answers
from belay_server.api.http.client_socket import CLIENT_LEFT, watch_socket
from belay_server.api.http.fields import query_flag
from belay_server.api.http.pages import shown
from belay_server.api.security.authentication import caller, watch_key
from belay_server.api.security.authorization import authorize
from belay_server.api.security.origins import origins
from belay_server.api.streaming.clients import StreamClient, WatchClient, stream_turns
from belay_server.api.streaming.runs import FollowedRun, stream_events, wait_for_outcome
from belay_server.domain.access import public_config
from belay_server.domain.run_options import RunOptions
from belay_server.domain.runs import RUN_FIELDS, Run

STREAM_TYPE = "text/event-stream; charset=utf-8"
#: OpenAPI schemas of the responses without a marshmallow schema.
EVENTS: dict[str, Any] = {
    "type": "object",
    "description": "One server-sent event. `data` is JSON; `id` is the position to resume from.",
    "properties": {name: {"type": "string"} for name in ("event", "data", "id")},
    "required": ["event", "data"],
}
OUTCOME: dict[str, Any] = {"description": "The graph's output, or an error if the run failed"}
NOTHING: dict[str, Any] = {"type": "object", "maxProperties": 0}
STREAM_HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}


def run_body(run: Run, fields: Sequence[str] = RUN_FIELDS) -> dict[str, Any]:
    """Return a run as JSON for clients, with its config as `public_config` returns it."""
    body = shown(run, fields)
    if "config" in body.get("kwargs", {}):
        body["kwargs"] = {**run.kwargs, "config": public_config(run.kwargs["config"])}
    return body


def run_path(run: Run | FollowedRun) -> str:
    """Return the path of a run below its thread: `/threads/{thread_id}/runs/{run_id}`."""
    return f"/threads/{run.thread_id}/runs/{run.run_id}"


def run_response(run: Run, location: str) -> Response:
    """Return a response with a created run. `location` is its path, for `content-location`."""
    return json_response(run_body(run), headers={"content-location": location})


def stream_response(followed: FollowedRun, location: str) -> Response:
    """Return a stream of the run's events. `location` is the run's path, for `content-location`;
    the `location` header is the path at which the stream can be joined again."""
    headers = {
        **STREAM_HEADERS,
        "location": f"{run_path(followed)}/stream",
        "content-location": location,
    }
    body = stream_events(parts(), followed, stream_client())
    return Response(body, 200, headers, content_type=STREAM_TYPE)


def outcome_response(followed: FollowedRun, location: str) -> Response:
    """Return a response that waits for the run's outcome. `location` is the run's path."""
    headers = {
        **STREAM_HEADERS,
        "location": f"{run_path(followed)}/join",
        "content-location": location,
    }
    body = wait_for_outcome(parts(), followed, stream_client())
    return Response(body, 200, headers, content_type="application/json")


def cancels_on_disconnect(options: RunOptions | None = None) -> bool:
    """Return whether to cancel the run when this client disconnects, from the run's options or the
    query, in any notation of the SDKs and the cancel guide.

    Raises Forbidden for a page of an origin that may not stop runs.
    """
    given = options.on_disconnect if options is not None else None
    cancels = (given or request.args.get("on_disconnect")) == "cancel" or query_flag(
        "cancel_on_disconnect", "cancel"
    )
    if cancels:
        origins().refuse_foreign_stop(request.headers)
    return cancels


def cancels_joined_run(**ids: UUID) -> bool:
    """Return whether to cancel the run of another request when this client disconnects. That needs
    the authorization of a cancel too. Call this before the run is looked up.

    Raises Forbidden, Refused, Unavailable.
    """
    cancels = cancels_on_disconnect()
    if cancels:
        authorize("threads", "update", dict(ids))
    return cancels


def stream_client() -> StreamClient:
    """Return the client of this request's streamed response."""
    return StreamClient(_watch_client(), large_answers().share_of(request), stream_turns())


def _watch_client() -> WatchClient:
    """Return a function that watches this request's socket. When the client's API key is revoked,
    the stream ends as after a disconnect, but the run is not cancelled."""
    client_socket = request.environ.get("gunicorn.socket")
    had_left = request.environ.get(CLIENT_LEFT, lambda: False)
    found, who = context(), caller()

    def watch(on_leave: Callable[[], None]) -> Callable[[], bool]:
        forget_key = watch_key(found, who, on_leave)
        stop_watching = None if client_socket is None else watch_socket(client_socket, on_leave)

        def stop() -> bool:
            forget_key()
            return (stop_watching is not None and stop_watching()) or had_left()

        return stop

    return watch
