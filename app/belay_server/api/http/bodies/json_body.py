"""Read and write JSON, and validate requests against their schemas.

JSON that cannot be stored exactly is refused before anything is created: malformed JSON, bytes that
are not UTF-8, lone surrogates, NaN, numbers beyond a double, NUL characters, too deep nesting, and
too many values (`json_documents`).
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import flask_smorest
import orjson
from flask import Request, Response, request
from marshmallow import EXCLUDE, Schema, ValidationError
from webargs import missing
from webargs.flaskparser import FlaskParser
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

from belay_server.api.context import context, parts
from belay_server.api.http.bodies.json_documents import INVALID, parse_document
from belay_server.api.http.bodies.large_bodies import large_bodies
from belay_server.api.http.error_schemas import Error
from belay_server.api.http.request_context import RUN_CREDENTIAL
from belay_server.domain.errors import InvalidRequest, TooLarge, TooSlow
from belay_server.graphs.serde import to_json
from belay_server.runtime.turns import wait_for_turn

#: The most elements of a body that is a list. It is checked before the elements are validated.
MOST_OF_MANY = 1_000


#: A request is authenticated again when receiving its body took longer than this.
_SLOW_SECONDS = 1.0
#: Encoding this much JSON, in bytes, takes about a millisecond.
_AT_ONCE = 256 * 1024


def json_response(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return a JSON response. Between the items of a large list, other requests are served."""
    encoded = _list_to_json(body) if isinstance(body, list) else to_json(body)
    return encoded_response(encoded, status, headers)


def encoded_response(
    body: bytes, status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    """Return a response whose body is JSON already."""
    return Response(body, status, headers, content_type="application/json")


def _list_to_json(items: list[Any]) -> bytes:
    """Encode a list item by item, yielding to other requests: a page may have 64 MiB."""
    pieces: list[bytes] = []
    size = 0
    for item in items:
        piece = to_json(item)
        pieces.append(piece)
        size += len(piece)
        if size > _AT_ONCE:
            size = 0
            wait_for_turn()
    return b"[" + b",".join(pieces) + b"]"


def read_body(request: Request, seconds: float | None) -> bytes:
    """Return all bytes of the body, received within `seconds` (None: no time limit).

    Raises InvalidRequest, TooLarge, TooSlow.
    """
    most = request.max_content_length
    try:
        with _deadline(seconds):
            raw = request.get_data(cache=True)
    except _OutOfTime as error:
        raise TooSlow() from error
    except RequestEntityTooLarge as error:
        raise TooLarge() from error
    except HTTPException:
        raise
    except Exception as error:  # such as the web server's error for invalid chunked encoding
        raise InvalidRequest(f"{INVALID}: the body could not be read") from error
    if request.content_length is None and most is not None and len(raw) >= most:
        raise TooLarge()  # a chunked body, which Werkzeug has truncated
    if request.content_length is not None and len(raw) < request.content_length:
        raise InvalidRequest(f"{INVALID}: the body ended before its Content-Length")
    return raw


def read_json_of(request: Request) -> Any:
    """Return the body as parsed JSON, within the limits of the settings and of all large bodies.

    Raises InvalidRequest, TooLarge, TooMany, TooSlow.
    """
    raw = read_body_of(request)
    large_bodies().take_turn(request, len(raw))
    return parse_document(raw, most_values=parts().settings.max_body_values)


def read_body_of(request: Request) -> bytes:
    """Return all bytes of the body, within the limits of the settings and of all large bodies.

    Raises InvalidRequest, TooLarge, TooMany, TooSlow; Unauthorized, Forbidden, Refused when the key
    has been revoked meanwhile.
    """
    most = request.max_content_length
    if most is None or (request.content_length or 0) <= most:
        large_bodies().hold(request)
    began = time.monotonic()
    raw = read_body(request, parts().settings.body_seconds)
    if time.monotonic() - began > _SLOW_SECONDS:
        _identify_again()
    return raw


def _identify_again() -> None:
    """Authenticate once more: the key may have been revoked while the body was received.

    Raises Unauthorized, Forbidden.
    """
    found = context()
    is_of_run = RUN_CREDENTIAL in request.environ
    if found.open_keys is not None and found.authentication is not None and not is_of_run:
        found.authentication.caller()


class _OutOfTime(Exception):
    """The time limit is exceeded. Not an OSError, which Werkzeug treats as a client disconnect."""


@contextmanager
def _deadline(seconds: float | None) -> Iterator[None]:
    """Limit the time to receive a body, so that a slow client cannot occupy the server for ever.

    Raises _OutOfTime under gevent. Other web servers have only their own timeouts.
    """
    if "gevent.monkey" not in sys.modules:
        yield
        return
    import gevent  # noqa: PLC0415

    with gevent.Timeout(seconds, _OutOfTime()):
        yield


class BelayParser(FlaskParser):
    """A webargs parser with Belay's JSON reading and errors. Unknown fields are ignored, as by
    LangGraph's server."""

    DEFAULT_UNKNOWN_BY_LOCATION = {  # noqa: RUF012
        "json": EXCLUDE,
        "query": EXCLUDE,
        "headers": EXCLUDE,
        "path": None,
    }

    def __init__(self) -> None:
        super().__init__()
        self._schemas: dict[type[Schema], Schema] = {}

    def _get_schema(self, argmap: Any, req: Request) -> Schema:
        """Return a schema. One instance of each class serves all requests, as creating a schema
        copies its fields."""
        if isinstance(argmap, type) and issubclass(argmap, Schema):
            if argmap not in self._schemas:
                self._schemas[argmap] = super()._get_schema(argmap, req)
            return self._schemas[argmap]
        schema: Schema = super()._get_schema(argmap, req)
        return schema

    def load_json(self, req: Request, schema: Schema) -> Any:
        """Return the request's JSON body. Raises InvalidRequest, TooLarge, TooMany, TooSlow."""
        document = read_json_of(req)
        if not isinstance(document, dict) and not schema.many:
            raise InvalidRequest(f'{_shown(document)} is not of type "object"')
        if schema.many and isinstance(document, list) and len(document) > MOST_OF_MANY:
            raise InvalidRequest(f"at most {MOST_OF_MANY} at once, not {len(document)}")
        return missing if document is None else document

    def handle_error(self, error: ValidationError, *_: Any, **__: Any) -> NoReturn:
        raise InvalidRequest(describe(error))


def _shown(value: Any) -> str:
    text = orjson.dumps(value).decode()
    return text if len(text) <= 100 else text[:100] + "…"


def describe(error: ValidationError) -> str:
    """Return the first validation error with its path: `config.tags: Not a valid list.`"""
    path: list[str] = []
    messages: Any = error.messages
    while isinstance(messages, dict):
        key = next(iter(messages))
        if key != "_schema":
            path.append(str(key))
        messages = messages[key]
    text = str(messages[0]) if isinstance(messages, list) and messages else str(messages)
    if path and path[0] in ("json", "query", "headers"):
        path = path[1:]
    return f"{'.'.join(path)}: {text}" if path else text


#: An id in a route, except in the routes that also accept a graph's name.
_PATH_ID = re.compile(r"<(\w+_id)>(?!/(?:graph|schemas|subgraphs))")


class Blueprint(flask_smorest.Blueprint):
    """Documents the errors that all routes may return, so that they need no decorators."""

    ARGUMENTS_PARSER = BelayParser()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._prepare_doc_cbks.append(_with_common_errors)

    def add_url_rule(self, rule: str, *args: Any, **kwargs: Any) -> None:
        """Add a route, and document the ids in its path as UUIDs."""
        kwargs["parameters"] = [
            {"in": "path", "name": name, "schema": {"type": "string", "format": "uuid"}}
            for name in _PATH_ID.findall(rule)
        ]
        super().add_url_rule(rule, *args, **kwargs)
        for name, operation in self._docs[self._endpoints[-1]].items():
            if name != "parameters":
                operation["has_path_parameters"] = "<" in rule


def _with_common_errors(doc: dict[str, Any], doc_info: dict[str, Any], **_: Any) -> dict[str, Any]:
    errors = {
        401: "Authentication required or invalid",
        403: "Not permitted",
        429: "Rate or concurrency limit exceeded; retry after `Retry-After` seconds",
        503: "Postgres or Redis is unavailable; retry after `Retry-After` seconds",
    }
    if doc_info["has_path_parameters"] or "parameters" in doc or "requestBody" in doc:
        errors[422] = "Validation error; nothing was changed"
    if "requestBody" in doc:
        errors[408] = "The request body was not received within the time limit"
        errors[413] = "The request body exceeds the size limit"
    common = {
        status: {"description": text, "content": {"application/json": {"schema": Error}}}
        for status, text in errors.items()
    }
    return {**doc, "responses": {**doc.get("responses", {}), **common}}
