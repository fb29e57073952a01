"""The Celery application of a worker, made from its settings and its project."""

from __future__ import annotations

import logging
import os
import socket
import sys
import uuid
from typing import Any, NoReturn

from celery import Celery

from belay_server.bus.project_cache import ProjectCache
from belay_server.configuration.project_env import add_project_env
from belay_server.configuration.setting_aliases import warn_of_ignored
from belay_server.configuration.settings import Settings, SettingsError
from belay_server.doorbell import celery_config
from belay_server.graphs.isolation import may_share
from belay_server.graphs.project.langgraph_json import read_project
from belay_server.graphs.project.loading import ProjectError
from belay_server.graphs.registry import GraphRegistry
from belay_workers.broker import PromptAMQP
from belay_workers.child.signals import ChildSignals
from belay_workers.execution.access import RunAccess
from belay_workers.placement import Placement
from belay_workers.slots import SlotTable
from belay_workers.supervision.guardian import Guardian
from belay_workers.supervision.orphans import Orphans

log = logging.getLogger(__name__)


class Belay(Celery):
    """A Celery app with the objects that the parts of its worker share."""

    amqp_cls = PromptAMQP
    settings: Settings
    graphs: GraphRegistry
    #: Known when the graphs are loaded (`parent.prepare`).
    placement: Placement
    slots: SlotTable
    access: RunAccess
    owner: str
    guardian: Guardian
    orphans: Orphans
    #: None when Postgres was unavailable at the start.
    allowed_connections: int | None = None
    child_signals: ChildSignals

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        #: Why graphs were isolated, by their positions.
        self._isolation_reasons: dict[int, str] = {}

    def isolate(self, graph: int, why: str) -> None:
        """Let the runs of a graph have a process each, for as long as this worker lives."""
        if self.slots.isolate(graph):
            self._isolation_reasons[graph] = why
            graph_id = self.graphs.graph_ids[graph]
            log.warning("graph '%s' does not share hosts from now on: %s", graph_id, why)

    def isolation_reasons(self) -> dict[str, str]:
        """Return why graphs do not share hosts now, by graph id."""
        return {
            self.graphs.graph_ids[graph]: self._isolation_reasons.get(graph, "")
            for graph in self.slots.isolated()
        }

    @property
    def needs_children(self) -> bool:
        """Whether a run may need a process of its own."""
        return self.placement.needs_children or bool(self.slots.isolated())


def make_app() -> Belay:
    """Return the app, with its graphs not loaded yet. Exits with 3 if a setting or the project is
    invalid."""
    try:
        add_project_env(os.environ)
        settings = Settings.from_environ(os.environ)
        project = read_project(settings.config_path)
    except (SettingsError, ProjectError) as error:
        refuse_to_start(error)
    made = Belay("belay", include=["belay_workers.tasks"])
    made.conf.update(celery_config(settings))
    # The most that it may be without an option of Celery's; see `parent.prepare`.
    hosted = settings.shared_concurrency if may_share(settings, project) else 0
    made.conf.worker_concurrency = settings.concurrency + hosted
    made.conf.worker_pool = "belay_workers.pool.run_pool:RunPool"
    made.settings = settings
    made.graphs = GraphRegistry(project)
    made.access = RunAccess(project.url_in(settings.internal_url))
    made.owner = f"{socket.gethostname()}/{uuid.uuid4().hex[:8]}"
    return made


def load_graphs(app: Belay) -> None:
    """Import the project's graphs. Exits when one of them cannot be loaded."""
    warn_of_ignored(os.environ)
    ProjectCache(app.settings).install()
    app.access.install()
    try:
        app.graphs = GraphRegistry.load(app.graphs.project)
    except ProjectError as error:
        refuse_to_start(error)


def refuse_to_start(error: Exception) -> NoReturn:
    """Print the error on one line and exit with 3, the code for "a restart does not help"."""
    print(f"belay worker: {error}", file=sys.stderr, flush=True)
    sys.exit(3)
