"""Create the Flask application: its blueprints, its error handlers and its OpenAPI document."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property, partial
from importlib.metadata import version
from types import MappingProxyType
from typing import Any

import flask_smorest
import orjson
from flask import Flask, Response, request
from flask_swagger_ui import get_swaggerui_blueprint

from belay_server.api.agent_runs import routes as agent_runs
from belay_server.api.agent_runs.blueprint import SECURITY_SCHEMES
from belay_server.api.agent_runs.schemas import COMPONENTS
from belay_server.api.assistants import routes as assistants
from belay_server.api.context import CONTEXT, ApiContext
from belay_server.api.crons import routes as crons
from belay_server.api.errors import register_error_handlers
from belay_server.api.http.error_schemas import Error
from belay_server.api.http.mount import Mounted
from belay_server.api.http.openapi_fields import describe_field
from belay_server.api.protocol import routes as protocol
from belay_server.api.protocol import socket_routes as protocol_socket
from belay_server.api.request_handlers import prepare_requests, refuse_unauthenticated
from belay_server.api.runs import batch_routes as batch_runs
from belay_server.api.runs import cancel_routes as bulk_runs
from belay_server.api.runs import stateless_routes as stateless_runs
from belay_server.api.runs import thread_routes as thread_runs
from belay_server.api.security.authentication import public
from belay_server.api.store import routes as store
from belay_server.api.system import routes as system
from belay_server.api.threads import routes as threads
from belay_server.api.threads import state_routes as thread_states
from belay_server.api.threads import stream_routes as thread_streams

#: Endpoints that serve the OpenAPI document. They are public.
_DOCUMENTS = ("api-docs", "swagger_ui")


class _Api(flask_smorest.Api):
    """A flask-smorest API with Belay's error schema, error handlers and fields."""

    ERROR_SCHEMA = Error
    #: Every error status is documented at its operations, so no default response is needed.
    DEFAULT_ERROR_RESPONSE_NAME = None
    #: The project's `auth.openapi`.
    authentication: Mapping[str, Any] = MappingProxyType({})
    #: `http.mount_prefix`.
    prefix = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ma_plugin.converter.add_attribute_function(describe_field)

    def _register_error_handlers(self) -> None:
        """Do nothing: `register_error_handlers` handles all errors."""

    @cached_property
    def _encoded_document(self) -> bytes:
        """The encoded OpenAPI document, created once: creating it takes many times as long as a
        usual request, and the document is public."""
        document = self.spec.to_dict()
        if self.prefix:
            document["servers"] = [{"url": self.prefix}]
        _describe_authentication(document, self.authentication)
        return orjson.dumps(document, option=orjson.OPT_INDENT_2)

    def _openapi_json(self) -> Response:
        return Response(self._encoded_document, content_type="application/json")


def _describe_authentication(document: dict[str, Any], openapi: Mapping[str, Any]) -> None:
    """Add the project's `auth.openapi` to the document. Security in `paths` is by path and
    method."""
    if schemes := openapi.get("securitySchemes"):
        document["components"].setdefault("securitySchemes", {}).update(schemes)
    if "security" in openapi:
        document["security"] = openapi["security"]
    for path, methods in openapi.get("paths", {}).items():
        for method, security in methods.items():
            operation = document["paths"].get(path, {}).get(method.lower())
            if operation is not None:
                operation["security"] = security


#: Blueprints by the noun of the option `http.disable_<noun>` in `langgraph.json` that disables
#: them. Runs on threads belong to "runs".
_BLUEPRINTS = {
    "meta": (system.blueprint,),
    "assistants": (assistants.blueprint,),
    "threads": (threads.blueprint, thread_states.blueprint, thread_streams.blueprint),
    "runs": (
        thread_runs.blueprint,
        stateless_runs.blueprint,
        batch_runs.blueprint,
        bulk_runs.blueprint,
        crons.blueprint,
    ),
    "store": (store.blueprint,),
}


def create_api(context: ApiContext) -> Flask:
    """Return the Flask application."""
    http = context.parts.graphs.project.http
    app = Flask("belay", static_folder=None)
    app.config.update(
        API_TITLE="Belay",
        API_VERSION=version("belay-server"),
        OPENAPI_VERSION="3.1.0",
        OPENAPI_URL_PREFIX="/" if http.serves("meta") else None,
        OPENAPI_JSON_PATH="openapi.json",
        MAX_CONTENT_LENGTH=context.parts.settings.max_body_bytes,
        PROPAGATE_EXCEPTIONS=False,
        TRAP_HTTP_EXCEPTIONS=False,
    )
    app.url_map.strict_slashes = False
    app.url_map.merge_slashes = False
    app.extensions[CONTEXT] = context
    api = _Api(app)
    api.authentication = context.parts.graphs.project.openapi
    for noun, blueprints in _BLUEPRINTS.items():
        if http.serves(noun):
            for blueprint in blueprints:
                api.register_blueprint(blueprint)
    api.register_blueprint(system.health)
    if http.serves("threads") and http.serves("event_streaming"):
        api.register_blueprint(protocol.blueprint)
        app.register_blueprint(protocol_socket.blueprint)
    if context.parts.graphs.project.agent_runs_graph is not None:
        _serve_agent_runs(api)
    if http.serves("meta"):
        document = f"{http.mount_prefix}/openapi.json"
        app.register_blueprint(get_swaggerui_blueprint("/docs", document))
    _refuse_open_views(app)
    register_error_handlers(app)
    authenticates = context.authentication is not None
    prepare_requests(app, context.parts.settings, http, authenticates=authenticates)
    project = context.project_routes
    if project is not None:
        before = partial(refuse_unauthenticated, app) if http.auth_first else _answer_nothing
        app.wsgi_app = project.inside_middleware(  # type: ignore[method-assign]
            app.wsgi_app, before=before, opens_socket=partial(_opens_socket, app)
        )
    if http.mount_prefix:
        api.prefix = http.mount_prefix
        app.wsgi_app = Mounted(app.wsgi_app, http.mount_prefix)  # type: ignore[method-assign]
    return app


def _opens_socket(app: Flask, environ: dict[str, Any]) -> bool:
    """Return whether a request opens a WebSocket of Belay's."""
    if environ.get("HTTP_UPGRADE", "").lower() != "websocket":
        return False
    with app.request_context(environ):
        return (request.endpoint or "").partition(".")[0] == protocol_socket.blueprint.name


def _answer_nothing(_environ: dict[str, Any]) -> None:
    """Leave a request to the middleware."""


def _refuse_open_views(app: Flask) -> None:
    """Raise TypeError for a view that is neither authorized nor public. Mark the views that serve
    the OpenAPI document as public."""
    for endpoint, view in app.view_functions.items():
        if endpoint.partition(".")[0] in _DOCUMENTS:
            app.view_functions[endpoint] = public(partial(view))
        elif not getattr(view, "is_public", False) and not getattr(view, "is_authorized", False):
            raise TypeError(f"{endpoint} needs a decorator: @authorized or @public")


def _serve_agent_runs(api: _Api) -> None:
    """Register the agent runs API, with the components of Exa's OpenAPI document."""
    for name, schema in COMPONENTS.items():
        api.spec.components.schema(name, schema)
    for name, scheme in SECURITY_SCHEMES.items():
        api.spec.components.security_scheme(name, scheme)
    api.register_blueprint(agent_runs.blueprint)
