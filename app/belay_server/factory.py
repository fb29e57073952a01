"""Create the web process's application. `create_app` is where its components are created.

gunicorn -c python:belay_server.gunicorn_conf "belay_server.factory:create_app()"
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Sequence
from uuid import UUID

import redis
from flask import Flask

from belay_server.api.application import create_api
from belay_server.api.context import ApiContext
from belay_server.api.project.app import ProjectApp
from belay_server.api.project.auth import ProjectAuth
from belay_server.api.project.code_access import access_headers
from belay_server.api.security.authentication import KeyAuthentication, authentication_of
from belay_server.api.security.limits import connection_owner
from belay_server.bus.cancel_flag import CancelFlags
from belay_server.bus.client import Keys, connect_redis
from belay_server.bus.event_log import EventLog
from belay_server.bus.isolated_graphs import IsolatedGraphs
from belay_server.bus.open_requests import OpenRequests
from belay_server.bus.project_cache import ProjectCache
from belay_server.bus.rate_limits import FailedLogins, RateLimits
from belay_server.bus.run_feed import RunFeed
from belay_server.configuration.project_env import add_project_env
from belay_server.configuration.setting_aliases import warn_of_ignored
from belay_server.configuration.settings import Settings, SettingsError
from belay_server.db import assistants as assistant_rows
from belay_server.db import runs as run_rows
from belay_server.db.assistants import SystemAssistant
from belay_server.db.migrate import SchemaNotReady, wait_for_schema
from belay_server.db.postgres.pool import Database, Pool, open_pool, while_unavailable
from belay_server.doorbell import Doorbell
from belay_server.graphs.checkpoints.own_checkpointer import api_checkpointer
from belay_server.graphs.isolation import shared_graphs
from belay_server.graphs.project.langgraph_json import GraphSpec, Project, read_project
from belay_server.graphs.project.loading import ProjectError
from belay_server.graphs.project.loopback import Loopback
from belay_server.graphs.registry import GraphRegistry
from belay_server.graphs.store import api_store
from belay_server.runtime import logs
from belay_server.services.agent_runs.output_schemas import OutputSchemaChecks
from belay_server.services.assistant_cache import AssistantCache
from belay_server.services.open_keys import OpenKeys
from belay_server.services.parts import Parts
from belay_server.states.jobs import StateParts
from belay_server.states.process import StateProcess
from belay_server.web_metrics import WebMetrics

log = logging.getLogger(__name__)

_SCHEMA_WAIT_SECONDS = 60.0
_CANCEL_CONNECTIONS = 2
#: A state with more pending tasks, and writes of these, is read in a process of its own: preparing
#: this many takes about 50 ms.
_MOST_TASKS = 600


def create_app(settings: Settings | None = None) -> Flask:
    """Return the WSGI application. Raises SettingsError, ProjectError or SchemaNotReady.

    Without `settings`, as gunicorn calls it, these errors end the process: it prints one line with
    the reason and exits with code 3, after which gunicorn does not start it again.
    """
    if settings is not None:
        return create_api(open_context(settings))
    try:
        add_project_env(os.environ)
        settings = Settings.from_environ(os.environ)
        logs.configure(settings)
        warn_of_ignored(os.environ)
        return create_api(open_context(settings))
    except (SettingsError, ProjectError, SchemaNotReady) as error:
        print(f"belay web: {error}", file=sys.stderr, flush=True)
        raise SystemExit(3) from error


def open_context(settings: Settings) -> ApiContext:
    """Open the connections and load the project. Raises ProjectError or SchemaNotReady."""
    project = read_project(settings.config_path)
    ProjectCache(settings).install()
    Loopback(project.url_in(settings.internal_url), access_headers).install()
    graphs = _load_graphs(settings, project)
    metrics = WebMetrics(settings.web_metrics_dir, reference_names=settings.reference_metrics)
    pool = open_pool(
        settings.database_url,
        size=settings.web_pool_size,
        pgbouncer=settings.pgbouncer,
        name="belay web",
        most_bytes=settings.max_answer_bytes,
        statement_seconds=settings.statement_seconds,
        whose=connection_owner,
        on_wait=metrics.waited_for_database,
    )
    database = Database(pool)
    # Wait for a Postgres that becomes unavailable here, as `_load_graphs` waits for one that was.
    while_unavailable(_SCHEMA_WAIT_SECONDS)(
        database.transaction,
        lambda conn: assistant_rows.put_system_assistants(conn, _system_assistants(graphs)),
    )
    authentication = authentication_of(settings, graphs.project, database)
    keys = Keys(settings.redis_prefix)
    client = connect_redis(settings)
    event_log = EventLog.of(settings, client, keys)
    states = _states(settings, graphs, database)
    parts = Parts(
        settings=settings,
        database=database,
        graphs=graphs,
        doorbell=Doorbell.of(settings, shared_graphs(settings, graphs)),
        cancel_flags=CancelFlags(client, keys),
        event_log=event_log,
        feed=_feed(settings, keys, event_log, database, metrics),
        assistant_cache=AssistantCache(),
        store=api_store(pool, graphs),
        isolated_graphs=IsolatedGraphs(client, keys),
        count_unstarted=metrics.ended_unstarted,
        states=states,
    )
    return ApiContext(
        parts=parts,
        cancel_database=Database(_open_cancel_pool(settings)),
        metrics=metrics,
        output_schemas=OutputSchemaChecks(states),
        project_routes=ProjectApp.load(graphs.project),
        rate_limits=RateLimits.of(
            settings.redis_url,
            settings.redis_prefix,
            requests=settings.rate_limit,
            cancels=settings.cancel_rate_limit,
        ),
        open_requests=OpenRequests.of(client, keys, settings.max_open_requests),
        authentication=authentication,
        authorization=authentication if isinstance(authentication, ProjectAuth) else None,
        open_keys=OpenKeys(database) if isinstance(authentication, KeyAuthentication) else None,
        failed_logins=FailedLogins(settings.redis_url, settings.redis_prefix),
    )


def _system_assistants(graphs: GraphRegistry) -> list[SystemAssistant]:
    def of(spec: GraphSpec) -> SystemAssistant:
        defaults = graphs.project.defaults.get(spec.graph_id, {})
        return SystemAssistant(
            spec.graph_id,
            graphs.name_of(spec.graph_id),
            spec.description,
            context=defaults.get("context") or defaults.get("configurable") or {},
        )

    return [of(spec) for spec in graphs.project.graphs.values()]


def _states(settings: Settings, graphs: GraphRegistry, database: Database) -> StateProcess:
    most_bytes = settings.large_state_bytes
    here = StateParts(
        settings,
        graphs,
        database,
        most_bytes=most_bytes,
        most_written_bytes=most_bytes,
        most_tasks=_MOST_TASKS,
        checkpointer=api_checkpointer(graphs.own_checkpointer),
        turn=threading.Lock(),
    )
    return StateProcess(here, connection_owner)


def _load_graphs(settings: Settings, project: Project) -> GraphRegistry:
    """Load the project's graphs, and wait until the database's schema is ready for them."""
    graphs = GraphRegistry.load(project)
    wait_for_schema(
        settings.database_url,
        seconds=_SCHEMA_WAIT_SECONDS,
        vectors=graphs.project.store.index is not None,
    )
    for warning in graphs.project.warnings:
        log.warning("%s", warning)
    return graphs


def _open_cancel_pool(settings: Settings) -> Pool:
    return open_pool(
        settings.database_url,
        size=_CANCEL_CONNECTIONS,
        pgbouncer=settings.pgbouncer,
        name="belay cancel",
        most_bytes=settings.max_answer_bytes,
    )


def _feed(
    settings: Settings, keys: Keys, event_log: EventLog, database: Database, metrics: WebMetrics
) -> RunFeed:
    def connect(timeout: float | None) -> redis.Redis:
        return connect_redis(settings, timeout=timeout)

    def ended_runs(run_ids: Sequence[UUID]) -> dict[UUID, str | None]:
        with database.connection() as conn:
            return run_rows.ended_runs(conn, run_ids)

    return RunFeed(connect, keys, event_log, ended_runs, metrics.listeners_changed)
