"""The WebSocket route of version 2 of the streaming protocol.

The client sends commands; the server sends responses and events. Each subscription follows the
thread independently, in its own thread (under gunicorn: a greenlet), and a lock serializes their
messages. The backpressure of a slow client delays only its own subscriptions.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from uuid import UUID

import flask
import orjson
from flask import Response, request
from simple_websocket import ConnectionClosed
from wsproto.utilities import RemoteProtocolError

from belay_server.api.context import context, parts
from belay_server.api.http.bodies.json_body import json_response
from belay_server.api.http.bodies.json_documents import MAX_DEPTH, parse_document
from belay_server.api.http.bodies.large_answers import large_answers
from belay_server.api.http.bodies.large_bodies import large_bodies
from belay_server.api.http.fields import path_uuid
from belay_server.api.http.web_socket import BoundedServer, handshake_refusal
from belay_server.api.project.socket_middleware import ACCEPT, MiddlewareSocket
from belay_server.api.protocol.commands import (
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
from belay_server.api.protocol.routes import event_filter, refuse_inaccessible_thread
from belay_server.api.security.authentication import caller, identify, watch_key
from belay_server.api.security.authorization import authorize, authorized
from belay_server.api.security.limits import count_request
from belay_server.api.security.origins import origins
from belay_server.api.streaming.clients import StreamClient, stream_turns
from belay_server.api.streaming.protocol import EventFilter, line_frame, stream_protocol
from belay_server.api.streaming.runs import StreamBody
from belay_server.api.streaming.threads import has_no_events
from belay_server.domain.errors import (
    BadRequest,
    BelayError,
    InvalidRequest,
    Refused,
    TooMany,
    Unauthorized,
)
from belay_server.graphs.serde import to_json

#: Not in the OpenAPI document: OpenAPI cannot describe WebSockets.
blueprint = flask.Blueprint("protocol socket", __name__)

_MOST_SUBSCRIPTIONS = 32
#: The size limit of the filters of all subscriptions of one socket, in bytes.
_MOST_IN_FILTERS = 256 * 1024
#: A command that exceeds a rate limit is parsed for its id only up to this length.
_SHORT = 4096
_NO_COMMAND = "Protocol commands must be valid JSON."
_GONE = (ConnectionClosed, OSError)


class _Handled(Response):
    """The empty response after a view has used the socket itself. gunicorn accepts StopIteration as
    the end of the response."""

    def __call__(self, *_args: Any, **_kwargs: Any) -> Any:
        self.close()
        raise StopIteration


@blueprint.route("/threads/<thread_id>/stream/events", methods=["GET"], websocket=True)
@authorized("threads", "read")
def events_socket(thread_id: str) -> Response:
    """Open a WebSocket for subscriptions (`subscription.subscribe`) and all other commands."""
    thread = path_uuid(thread_id, "thread")
    refuse_inaccessible_thread(thread)
    if not origins().may_ask(request.headers.get("Origin"), request.host):
        return json_response({"detail": "This origin may not open a WebSocket here."}, 403)
    environ = request.environ
    if environ.get("gunicorn.socket") is None:
        return json_response({"detail": "This web server does not support WebSockets."}, 501)
    accept = environ.get(ACCEPT, lambda: BoundedServer(environ))
    try:
        socket = accept()
    except RemoteProtocolError as error:
        status, detail, headers = handshake_refusal(environ, error)
        return json_response({"detail": detail}, status, headers=headers)
    except OSError:  # the client has disconnected
        return _Handled()
    _Conversation(socket, thread).hold()
    return _Handled()


class _Conversation:
    """The connection of one client, until either side closes it."""

    def __init__(self, server: BoundedServer | MiddlewareSocket, thread_id: UUID) -> None:
        self._server = server
        self._thread_id = thread_id
        self._turn = threading.Lock()
        self._subscriptions: dict[str, _SocketSubscription] = {}

    def hold(self) -> None:
        """Receive commands and send responses until the connection is closed."""
        forget_key = watch_key(context(), caller(), self._close)
        try:
            while True:
                received = self._server.receive()
                if received is None:
                    break
                self._send(to_json(self._answer(received)))
        except (*_GONE, Unauthorized, Refused):
            pass  # the connection is lost, or the caller is no longer authenticated
        finally:
            forget_key()
            for followed in list(self._subscriptions.values()):
                followed.leave()
            with suppress(*_GONE):
                self._server.close()

    def _close(self) -> None:
        with suppress(*_GONE):
            self._server.close()

    def _send(self, message: bytes) -> None:
        with self._turn:
            self._server.send(message.decode())

    def _answer(self, received: str | bytes) -> Answer:
        """Execute a command and return its response. Each command is authenticated and counted like
        a separate request. Raises Unauthorized, Refused."""
        identify(context())
        try:
            frame = self._counted(received)
        except NoCommand as refused:
            return refused.answer
        try:
            if frame.method == SUBSCRIBE:
                return self._subscribe(frame)
            if frame.method == UNSUBSCRIBE:
                return self._unsubscribe(frame)
            return answer_of(self._thread_id, frame)
        except BelayError as error:
            return failure(frame.id, "unknown_error", error.detail)

    def _counted(self, received: str | bytes) -> Frame:
        """Count a command and return it. Raises NoCommand, also when a limit is exceeded."""
        try:
            count_request(context())
            most_values = parts().settings.max_body_values
            with large_bodies().turn(len(received)):
                return frame_of(parse_document(received, most_values=most_values))
        except TooMany as error:
            too_many = failure(_id_of(received), "unknown_error", error.detail)
            raise NoCommand(too_many) from error
        except InvalidRequest as error:
            message = f"{_NO_COMMAND} (to {MAX_DEPTH} levels)"
            raise NoCommand(failure(None, "invalid_argument", message)) from error

    def _subscribe(self, frame: Frame) -> Answer:
        if len(self._subscriptions) >= _MOST_SUBSCRIPTIONS:
            message = f"A socket may have at most {_MOST_SUBSCRIPTIONS} subscriptions."
            return failure(frame.id, "invalid_argument", message)
        try:
            wanted = event_filter(frame.params)
        except BadRequest as error:
            return failure(frame.id, "invalid_argument", error.detail)
        in_filters = wanted.size + sum(one.wanted.size for one in self._subscriptions.values())
        if in_filters > _MOST_IN_FILTERS:
            message = "The channels and namespaces of this socket's subscriptions are too large."
            return failure(frame.id, "invalid_argument", message)
        # The thread may be another caller's by now, or this caller's access may have changed.
        authorize("threads", "read", {"thread_id": self._thread_id})
        refuse_inaccessible_thread(self._thread_id)
        name = str(uuid.uuid4())
        result: dict[str, Any] = {"subscription_id": name}
        if has_no_events(parts().event_log, self._thread_id):
            result["replayed_events"] = 0  # otherwise the number is known only at the end
        self._subscriptions[name] = followed = _SocketSubscription(self, self._thread_id, wanted)
        followed.start()
        return success(frame.id, result)

    def _unsubscribe(self, frame: Frame) -> Answer:
        name = frame.params.get("subscription_id")
        followed = self._subscriptions.pop(name, None) if isinstance(name, str) else None
        if followed is None:
            message = f"Unknown subscription: {name}"
            return failure(frame.id, "no_such_subscription", message)
        followed.leave()
        return success(frame.id, {})

    def send_body(self, body: StreamBody) -> None:
        """Send the messages of a subscription, except heartbeats; WebSocket pings replace them."""
        begun: list[bytes] = []  # the pieces of a large message
        for chunk in body:
            begun.append(chunk)
            if not chunk.endswith(b"\n"):
                continue
            for message in b"".join(begun).splitlines():
                if message and not message.startswith(b":"):
                    self._send(message)
            begun.clear()


def _id_of(received: str | bytes) -> int | None:
    """Return the id of a command that is not executed; None when it has none or is long."""
    if len(received) > _SHORT:
        return None
    try:
        document = orjson.loads(received)
    except orjson.JSONDecodeError:
        return None
    given = document.get("id") if isinstance(document, dict) else None
    return given if type(given) is int else None


class _SocketSubscription:
    """A subscription: sends a thread's events on the socket until the client unsubscribes or
    disconnects."""

    def __init__(self, talk: _Conversation, thread_id: UUID, wanted: EventFilter) -> None:
        self._talk = talk
        self.wanted = wanted
        self._leave: Callable[[], None] = lambda: None
        self._left = False
        client = StreamClient(self._watch, large_answers().share_of(request), stream_turns())
        self._body = stream_protocol(parts(), thread_id, wanted, line_frame, client)

    def _watch(self, on_leave: Callable[[], None]) -> Callable[[], bool]:
        self._leave = on_leave
        if self._left:
            on_leave()
        return lambda: self._left

    def start(self) -> None:
        threading.Thread(target=self._run, name="belay-subscription", daemon=True).start()

    def _run(self) -> None:
        try:
            self._talk.send_body(self._body)
        except _GONE:
            pass
        finally:
            self._body.close()

    def leave(self) -> None:
        self._left = True
        self._leave()
