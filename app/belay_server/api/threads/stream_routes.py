"""The route that streams a thread: the events of its runs, and its own changes."""

from __future__ import annotations

from typing import Any

import marshmallow as ma
from flask import Response, request

from belay_server.api.context import parts
from belay_server.api.http.bodies.json_body import Blueprint
from belay_server.api.http.error_schemas import Error
from belay_server.api.http.fields import path_uuid, query_list
from belay_server.api.runs.responses import EVENTS, STREAM_HEADERS, STREAM_TYPE, stream_client
from belay_server.api.security.authorization import authorized
from belay_server.api.streaming.threads import THREAD_STREAM_MODES, follow_thread, stream_thread
from belay_server.domain.errors import InvalidRequest

blueprint = Blueprint("thread streams", __name__, description="Streams of threads")


class ThreadStreamQuery(ma.Schema):
    """The query of a thread's stream. The default mode is `run_modes`."""

    #: The Python SDK sends the second name.
    stream_modes = ma.fields.List(
        ma.fields.String(), metadata={"description": f"Any of {', '.join(THREAD_STREAM_MODES)}."}
    )
    stream_mode = ma.fields.List(
        ma.fields.String(), metadata={"description": "An alias of `stream_modes`."}
    )


@blueprint.get("/threads/<thread_id>/stream")
@blueprint.arguments(ThreadStreamQuery, location="query")
@blueprint.response(
    200, EVENTS, description="The thread's events", content_type="text/event-stream"
)
@blueprint.alt_response(404, schema=Error)
@authorized("threads", "read")
def stream(query: dict[str, Any], thread_id: str) -> Response:
    """Stream a thread. `Last-Event-ID` (exclusive; `-` from the start) resumes the stream."""
    asked = query_list(query.get("stream_modes")) or query_list(query.get("stream_mode"))
    modes = frozenset(asked or ["run_modes"])
    if unknown := sorted(modes - set(THREAD_STREAM_MODES)):
        raise InvalidRequest(f"Invalid stream mode: {unknown[0]}")
    thread = path_uuid(thread_id, "thread")
    followed = follow_thread(parts().database, thread, modes, request.headers.get("Last-Event-ID"))
    body = stream_thread(parts(), followed, stream_client())
    return Response(body, 200, STREAM_HEADERS, content_type=STREAM_TYPE)
