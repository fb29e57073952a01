"""Version 2 of the streaming protocol on a WebSocket: commands in, their answers and events out.

Each subscription follows the thread on its own, in a thread (under gunicorn: a greenlet) of its
own; they take turns on the socket. A slow reader holds up its own subscriptions and nobody else.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import flask
import orjson
from flask import Response, request
from simple_websocket import ConnectionClosed, Server

from app.api.authorization import authorized
from app.api.cors import origin_may_ask
from app.api.fields import path_uuid
from app.api.json_body import MAX_DEPTH, check_document, json_response
from app.api.limits import count_request
from app.api.parts import parts
from app.api.protocol import event_filter, refuse_strange_thread
from app.api.protocol_commands import (
    SUBSCRIBE,
    UNSUBSCRIBE,
    Answer,
    Frame,
    NoCommand,
    answer_of,
    failure,
    frame_of,
    success,
)
from app.domain.errors import BadRequest, BelayError, InvalidRequest
from app.graphs.serde import to_json
from app.services.protocol_stream import EventFilter, line_frame, stream_protocol
from app.services.run_stream import Following

#: Not in the OpenAPI document, which has no words for it.
blueprint = flask.Blueprint("protocol socket", __name__)

_MOST_SUBSCRIPTIONS = 32
#: A socket that nobody reads is found out by a ping without an answer.
_PING_SECONDS = 25
_NO_COMMAND = "Protocol commands must be valid JSON."
_GONE = (ConnectionClosed, OSError)


class _Handled(Response):
    """What had the socket to itself leaves nothing to answer; gunicorn takes that for its word."""

    def __call__(self, *_args: Any, **_kwargs: Any) -> Any:
        self.close()
        raise StopIteration


class _WholeSends:
    """A socket whose `send` sends everything, as simple-websocket takes it to do."""

    def __init__(self, wrapped: Any) -> None:
        self._wrapped = wrapped

    def send(self, data: bytes) -> None:
        self._wrapped.sendall(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)


@blueprint.route("/threads/<thread_id>/stream/events", methods=["GET"], websocket=True)
@authorized("threads", "read")
def events_socket(thread_id: str) -> Response:
    """Subscribe with `subscription.subscribe`; all other commands are taken too."""
    thread = path_uuid(thread_id, "thread")
    refuse_strange_thread(thread)
    if not _may_connect(request.headers.get("Origin")):
        return json_response({"detail": "This origin may not open a WebSocket here."}, 403)
    client_socket = request.environ.get("gunicorn.socket")
    if client_socket is None:
        return json_response({"detail": "This web server has no WebSockets."}, 501)
    environ = {**request.environ, "gunicorn.socket": _WholeSends(client_socket)}
    limit = parts().settings.max_body_bytes
    server = Server(environ, ping_interval=_PING_SECONDS, max_message_size=limit)
    _Conversation(server, thread).hold()
    return _Handled()


def _may_connect(origin: str | None) -> bool:
    """CORS does not hold for WebSockets: any page could open one. Pages of this server may, and of
    the origins that CORS allows."""
    if origin is None or urlsplit(origin).netloc == request.host:
        return True
    return origin_may_ask(parts().settings, parts().graphs.project.http.cors, origin)


class _Conversation:
    """One client's socket, until one of us closes it."""

    def __init__(self, server: Server, thread_id: UUID) -> None:
        self._server = server
        self._thread_id = thread_id
        self._turn = threading.Lock()
        self._following: dict[str, _Followed] = {}

    def hold(self) -> None:
        try:
            while True:
                received = self._server.receive()
                if received is None:
                    break
                self._say(to_json(self._answer(received)))
        except _GONE:
            pass
        finally:
            for followed in list(self._following.values()):
                followed.leave()
            with suppress(*_GONE):
                self._server.close()

    def _say(self, message: bytes) -> None:
        with self._turn:
            self._server.send(message.decode())

    def _answer(self, received: str | bytes) -> Answer:
        try:
            document = orjson.loads(received)
            check_document(document)
            frame = frame_of(document)
        except (orjson.JSONDecodeError, InvalidRequest):
            return failure(None, "invalid_argument", f"{_NO_COMMAND} (to {MAX_DEPTH} levels)")
        except NoCommand as refused:
            return refused.answer
        try:
            count_request(parts())
            if frame.method == SUBSCRIBE:
                return self._subscribe(frame)
            if frame.method == UNSUBSCRIBE:
                return self._unsubscribe(frame)
            return answer_of(self._thread_id, frame)
        except BelayError as error:
            return failure(frame.id, "unknown_error", error.detail)

    def _subscribe(self, frame: Frame) -> Answer:
        if len(self._following) >= _MOST_SUBSCRIPTIONS:
            message = f"At most {_MOST_SUBSCRIPTIONS} subscriptions on a socket."
            return failure(frame.id, "invalid_argument", message)
        try:
            wanted = event_filter(frame.params)
        except BadRequest as error:
            return failure(frame.id, "invalid_argument", error.detail)
        name = str(uuid.uuid4())
        self._following[name] = followed = _Followed(self, self._thread_id, wanted)
        followed.start()
        return success(frame.id, {"subscription_id": name, "replayed_events": 0})

    def _unsubscribe(self, frame: Frame) -> Answer:
        name = frame.params.get("subscription_id")
        followed = self._following.pop(name, None) if isinstance(name, str) else None
        if followed is None:
            message = f"Unknown subscription: {name}"
            return failure(frame.id, "no_such_subscription", message)
        followed.leave()
        return success(frame.id, {})

    def tell(self, following: Following) -> None:
        """Send what a subscription brings; heartbeats are the pings' business."""
        for chunk in following:
            for message in chunk.splitlines():
                if message and not message.startswith(b":"):
                    self._say(message)


class _Followed:
    """A subscription: what its thread does, told on the socket until somebody leaves."""

    def __init__(self, talk: _Conversation, thread_id: UUID, wanted: EventFilter) -> None:
        self._talk = talk
        self._leave: Callable[[], None] = lambda: None
        self._left = False
        self._following = stream_protocol(parts(), thread_id, wanted, line_frame, self._watch)

    def _watch(self, on_leave: Callable[[], None]) -> Callable[[], bool]:
        self._leave = on_leave
        if self._left:
            on_leave()
        return lambda: self._left

    def start(self) -> None:
        threading.Thread(target=self._run, name="belay-subscription", daemon=True).start()

    def _run(self) -> None:
        try:
            self._talk.tell(self._following)
        except _GONE:
            pass
        finally:
            self._following.close()

    def leave(self) -> None:
        self._left = True
        self._leave()
