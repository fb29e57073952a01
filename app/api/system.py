"""Is it up, and what is it."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from flask import Response, request

from app.api.json_body import Blueprint, json_response
from app.api.parts import parts
from app.api.system_schemas import Info, Ok
from app.db.connection import fetch_value

blueprint = Blueprint("system", __name__, description="Is it up, and what is it")


@blueprint.get("/ok")
@blueprint.response(200, Ok, description="The server answers. `check_db=1` asks Postgres too.")
def ok() -> Response:
    if request.args.get("check_db", "").lower() in ("1", "true"):
        with parts().database.connection() as conn:
            fetch_value(conn, "SELECT 1", {})
    return json_response({"ok": True, "services": {}})


@blueprint.get("/info")
@blueprint.response(200, Info, description="Versions and what this server can do.")
def info() -> Response:
    flags: dict[str, Any] = {"assistants": True, "crons": True, "langsmith": False}
    return json_response(
        {
            "version": version("belay"),
            "langgraph_py_version": version("langgraph"),
            "flags": flags,
            "host": {
                "kind": "self-hosted",
                "project_id": None,
                "host_revision_id": None,
                "revision_id": None,
                "tenant_id": None,
            },
        }
    )
