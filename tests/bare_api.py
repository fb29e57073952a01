"""Make a test client of the API with a project's graphs, without Postgres, Redis or a worker."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from flask.testing import FlaskClient

from belay_server.api.application import create_api
from belay_server.api.context import ApiContext
from belay_server.configuration.settings import Settings
from belay_server.domain.access import EVERYTHING
from belay_server.graphs.project.langgraph_json import read_project
from belay_server.graphs.registry import GraphRegistry
from belay_server.web_metrics import WebMetrics
from tests.servers import PROJECT


def bare_client(config: Path = PROJECT) -> FlaskClient:
    settings = Settings.from_environ({"DATABASE_URL": "postgresql://x/", "REDIS_URL": "redis://x/"})
    parts = SimpleNamespace(
        settings=settings,
        graphs=GraphRegistry(read_project(config)),
        database=SimpleNamespace(access=EVERYTHING),
    )
    context = ApiContext(
        parts=cast(Any, parts),
        cancel_database=cast(Any, None),
        metrics=WebMetrics(),
        output_schemas=cast(Any, None),
        authentication=None,
    )
    return create_api(context).test_client()
