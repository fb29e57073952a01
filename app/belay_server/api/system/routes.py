"""The routes for health, versions and metrics."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from flask import Response, request
from prometheus_client import CONTENT_TYPE_LATEST

from belay_server.api.context import context, parts
from belay_server.api.http.bodies.json_body import Blueprint, json_response
from belay_server.api.http.fields import query_flag
from belay_server.api.security.authorization import authorizes_itself, public
from belay_server.api.system.schemas import Info, Ok
from belay_server.db.postgres.pool import Database
from belay_server.db.postgres.statements import fetch_value
from belay_server.graphs.project.keys import schema_text
from belay_server.services.queue_metrics import QueueCollector, queue_summary

#: The version of LangGraph's server whose API this is. Clients choose features by it.
SPOKEN_VERSION = "0.16.7"
#: `http.disable_meta` disables this blueprint, but not `health`.
blueprint = Blueprint("system", __name__, description="Versions and metrics")
health = Blueprint("health", __name__, description="Health check")


@health.get("/")
@health.response(200, Ok, description="The same as `/ok`.")
@public
def root() -> Response:
    """Return that the server is up."""
    return json_response({"ok": True, "services": {}})


@health.get("/ok")
@health.response(200, Ok, description="The server is up. `check_db=1` also queries Postgres.")
@public
def ok() -> Response:
    """Return that the server is up; with `check_db=1` (ignored with `http.disable_meta`), that
    Postgres responds, too."""
    if query_flag("check_db") and parts().graphs.project.http.serves("meta"):
        with parts().database.connection() as conn:
            fetch_value(conn, "SELECT 1", {})
    return json_response({"ok": True, "services": {}})


@blueprint.get("/info")
@blueprint.response(200, Info, description="The server's versions and features.")
@public
def info() -> Response:
    """Return the versions of the server and of LangGraph, and the available features."""
    flags: dict[str, Any] = {
        "assistants": parts().graphs.project.http.serves("assistants"),
        "crons": True,
        "langsmith": False,
        "strict_resume": True,
    }
    return json_response(
        {
            "version": SPOKEN_VERSION,
            "belay_version": version("belay-server"),
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


@blueprint.get("/langgraph.schema.json")
@blueprint.response(200, description="The JSON schema of `langgraph.json`.")
@blueprint.doc(responses={"200": {"content": {"application/schema+json": {"schema": {}}}}})
@public
def langgraph_schema() -> Response:
    """Return the JSON schema of `langgraph.json`, including Belay's own keys."""
    return Response(schema_text(), content_type="application/schema+json")


_METRICS = {
    "text/plain": {"schema": {"type": "string"}},
    "application/json": {"schema": {"type": "object"}},
}


@blueprint.get("/metrics")
@blueprint.response(
    200, description="Metrics for Prometheus; with `format=json`, a summary of the queues."
)
@blueprint.doc(responses={"200": {"content": _METRICS}})
@authorizes_itself
def metrics() -> Response:
    """Return metrics in Prometheus format; with `format=json`, a summary of the queues."""
    measured = context().metrics
    if request.args.get("format") == "json":
        database = parts().database
        return json_response(measured.summaries.get(lambda: _summary(database)))
    queues = QueueCollector(
        parts().database,
        parts().graphs.project.queues,
        reference_names=parts().settings.reference_metrics,
    )
    text = measured.texts.get(lambda: measured.exposition(queues))
    return Response(text, content_type=CONTENT_TYPE_LATEST)


def _summary(database: Database) -> dict[str, Any]:
    """Return a summary in the format of LangGraph's own server. The number and the capacity of the
    workers are unknown to the web process: each worker exports its metrics on its own port."""
    queue = queue_summary(database)
    return {
        "queue": queue,
        "api": {"http_requests_total": context().metrics.requests()},
        "workers": {"max": None, "active": queue["n_running"], "available": None},
    }
