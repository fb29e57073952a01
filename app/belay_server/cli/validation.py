"""Check a project without starting anything: `belay validate`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from belay_server.api.project.app import ProjectApp
from belay_server.api.project.auth import ProjectAuth
from belay_server.configuration.project_env import add_project_env
from belay_server.configuration.settings import SettingsError
from belay_server.graphs.project.langgraph_json import GraphSpec, Project, read_project
from belay_server.graphs.project.loading import ProjectError
from belay_server.graphs.registry import GraphRegistry, NotAGraph, build_graph


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the result."""

    text: str
    is_error: bool = False


def validate_project(config: Path) -> Iterator[Finding]:
    """Yield what is right, wrong, and without effect in a project. Its code is imported, and each
    factory is called with an empty config."""
    os.environ["BELAY_CONFIG"] = str(config)
    try:
        add_project_env(os.environ)
        project = read_project(config)
    except (ProjectError, SettingsError) as error:
        yield Finding(str(error), is_error=True)
        return
    yield from (Finding(warning) for warning in project.warnings)
    project.apply_environment()
    for spec in project.graphs.values():
        yield _graph(project, spec)
    yield from _others(project)


def _graph(project: Project, spec: GraphSpec) -> Finding:
    who = f"graph '{spec.graph_id}' ({spec.target})"
    try:
        return Finding(f"{who}: {build_graph(project, spec)}")
    except (ProjectError, NotAGraph) as error:
        return Finding(str(error), is_error=True)
    except Exception as error:  # noqa: BLE001  (the project's own: it may need a run's config)
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        return Finding(f"{who}: a factory, which fails without a run's config: {cause}")


def _others(project: Project) -> Iterator[Finding]:
    """Yield a finding for each other object that the project names."""
    loads: dict[str, tuple[object, Callable[[], object]]] = {
        "store.index": (project.store.index, lambda: GraphRegistry(project).store),
        f"store ({project.store.path})": (
            project.store.path,
            lambda: GraphRegistry(project).own_store,
        ),
        f"checkpointer ({project.checkpointer})": (
            project.checkpointer,
            lambda: GraphRegistry(project).own_checkpointer,
        ),
        f"auth ({project.auth})": (project.auth, lambda: ProjectAuth.load(project)),
        f"http.app ({project.http.app})": (project.http.app, lambda: ProjectApp.check(project)),
    }
    for who, (is_named, load) in loads.items():
        if is_named is None:
            continue
        try:
            load()
            yield Finding(f"{who}: ok")
        except ProjectError as error:
            yield Finding(str(error), is_error=True)
