"""The schemas of the health check and the server's information."""

from __future__ import annotations

import marshmallow as ma

from belay_server.api.http.fields import Object


class Ok(ma.Schema):
    """The response of the health check. `services` is always empty."""

    ok = ma.fields.Boolean(required=True)
    services = Object(required=True)


class Info(ma.Schema):
    """The server's information. `version` is that of LangGraph's server whose API this is."""

    version = ma.fields.String(required=True)
    belay_version = ma.fields.String(required=True)
    langgraph_py_version = ma.fields.String(required=True)
    flags = Object(required=True)
    host = Object(required=True)
