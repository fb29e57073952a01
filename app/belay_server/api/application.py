"""The Flask application: its blueprints, its errors, and the OpenAPI document made from them."""

from __future__ import annotations

from functools import cached_property, partial
from typing import Any

import flask_smorest
import orjson
from flask import Flask, Response
from flask_swagger_ui import get_swaggerui_blueprint

from belay_server.api.agent_runs import routes as agent_runs
from belay_server.api.agent_runs.blueprint import SECURITY_SCHEMES
from belay_server.api.agent_runs.schemas import COMPONENTS
from belay_server.api.assistants import routes as assistants
from belay_server.api.context import PARTS
from belay_server.api.crons import routes as crons
from belay_server.api.http.error_schemas import Error
from belay_server.api.http.errors import register_error_handlers
from belay_server.api.http.openapi_fields import describe_field
from belay_server.api.http.request_context import prepare_requests
from belay_server.api.protocol import routes as protocol
from belay_server.api.protocol import socket_routes as protocol_socket
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
from belay_server.services.parts import Parts

VERSION = "0.1.0"


#: Endpoints that show the OpenAPI document. They are everybody's.
_DOCUMENTS = ("api-docs", "swagger_ui")


class _Api(flask_smorest.Api):
    """Our errors and fields, in the document as on the wire."""

    ERROR_SCHEMA = Error
    #: Each status is documented where it may come, so there is no default to hide behind.
    DEFAULT_ERROR_RESPONSE_NAME = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ma_plugin.converter.add_attribute_function(describe_field)

    def _register_error_handlers(self) -> None:
        """`register_error_handlers` does it, for all errors."""

    @cached_property
    def _encoded_document(self) -> bytes:
        """Made once: it takes many times as long as a usual request, and anybody may ask for it."""
        return orjson.dumps(self.spec.to_dict(), option=orjson.OPT_INDENT_2)

    def _openapi_json(self) -> Response:
        return Response(self._encoded_document, content_type="application/json")


#: By the noun that `http.disable_<noun>` of `langgraph.json` switches them off with. A run on a
#: thread is a run. There are no routes yet for those that are not here.
_BLUEPRINTS = {
    "meta": (system.blueprint,),
    "assistants": (assistants.blueprint,),
    "threads": (
        threads.blueprint,
        thread_states.blueprint,
        thread_streams.blueprint,
        protocol.blueprint,
    ),
    "runs": (
        thread_runs.blueprint,
        stateless_runs.blueprint,
        batch_runs.blueprint,
        bulk_runs.blueprint,
        crons.blueprint,
    ),
    "store": (store.blueprint,),
}


def create_api(parts: Parts) -> Flask:
    http = parts.graphs.project.http
    app = Flask("belay", static_folder=None)
    app.config.update(
        API_TITLE="Belay",
        API_VERSION=VERSION,
        OPENAPI_VERSION="3.1.0",
        OPENAPI_URL_PREFIX="/" if http.serves("meta") else None,
        OPENAPI_JSON_PATH="openapi.json",
        MAX_CONTENT_LENGTH=parts.settings.max_body_bytes,
        PROPAGATE_EXCEPTIONS=False,
        TRAP_HTTP_EXCEPTIONS=False,
    )
    app.url_map.strict_slashes = False
    app.url_map.merge_slashes = False
    app.extensions[PARTS] = parts
    api = _Api(app)
    for noun, blueprints in _BLUEPRINTS.items():
        if http.serves(noun):
            for blueprint in blueprints:
                api.register_blueprint(blueprint)
    api.register_blueprint(system.health)
    if http.serves("threads"):
        app.register_blueprint(protocol_socket.blueprint)
    if parts.graphs.project.agent_runs_graph is not None:
        _serve_agent_runs(api)
    if http.serves("meta"):
        app.register_blueprint(get_swaggerui_blueprint("/docs", "/openapi.json"))
    _refuse_open_views(app)
    register_error_handlers(app)
    authenticates = parts.authentication is not None
    prepare_requests(app, parts.settings, http.cors, authenticates=authenticates)
    return app


def _refuse_open_views(app: Flask) -> None:
    """Every view says what it does, so that it can be asked whether that may be done. Raises
    TypeError."""
    for endpoint, view in app.view_functions.items():
        if endpoint.partition(".")[0] in _DOCUMENTS:
            app.view_functions[endpoint] = public(partial(view))
        elif not getattr(view, "is_public", False) and not getattr(view, "is_authorized", False):
            raise TypeError(f"{endpoint} says neither @authorized nor @public")


def _serve_agent_runs(api: _Api) -> None:
    """The second API has the components that Exa's own documents have."""
    for name, schema in COMPONENTS.items():
        api.spec.components.schema(name, schema)
    for name, scheme in SECURITY_SCHEMES.items():
        api.spec.components.security_scheme(name, scheme)
    api.register_blueprint(agent_runs.blueprint)
