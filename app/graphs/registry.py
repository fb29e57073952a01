"""The project: `langgraph.json`, its graphs, and its environment.

Read as LangGraph's own CLI reads it: `graphs` (`path:variable`, `module:variable`, or an object
with `path`), `dependencies` on the import path, `env` (a file or a map). On top of that, `queues`
routes a graph's runs to a Celery queue of its own.

A graph may be compiled, a `StateGraph` still to compile, or a factory of either: sync, async, a
context manager, with or without the run's config.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
from dotenv import dotenv_values
from langgraph.graph.state import StateGraph
from langgraph.pregel import Pregel

from app.domain.headers import HeaderPatterns
from app.domain.threads import ThreadTtl, TtlStrategy
from app.graphs.http_config import HttpConfig, read_http_config
from app.graphs.project_files import ProjectError, load_object
from app.settings import DEFAULT_QUEUE

#: A compiled graph, whatever its state and context.
Graph = Pregel[Any, Any, Any, Any]


@dataclass(frozen=True, slots=True)
class GraphSpec:
    """One entry of `graphs`."""

    graph_id: str
    target: str
    description: str | None
    queue: str


@dataclass(frozen=True, slots=True)
class Project:
    """What `langgraph.json` says. `root` is the folder it lies in."""

    root: Path
    graphs: Mapping[str, GraphSpec]
    dependencies: tuple[Path, ...]
    env: Mapping[str, str]
    #: Defaults of a graph's config and context, by graph id (LANGGRAPH_CONFIG).
    defaults: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    #: Of threads that are created without one (`checkpointer.ttl`).
    thread_ttl: ThreadTtl | None = None
    #: What it says of the HTTP side (`http`).
    http: HttpConfig = field(default_factory=HttpConfig)

    @property
    def configurable_headers(self) -> HeaderPatterns:
        """Which headers of a request its runs see."""
        return self.http.configurable_headers

    @property
    def queues(self) -> list[str]:
        """Every queue a graph of this project uses, the default one first."""
        named = sorted({spec.queue for spec in self.graphs.values()} - {DEFAULT_QUEUE})
        return [DEFAULT_QUEUE, *named]

    def apply_environment(self, environ: dict[str, str] | None = None) -> None:
        """Put the dependencies on the import path and the project's variables in place.

        A variable that the operator has set stays as it is.
        """
        target = os.environ if environ is None else environ
        for name, value in self.env.items():
            target.setdefault(name, value)
        for folder in reversed(self.dependencies):
            if str(folder) not in sys.path:
                sys.path.insert(0, str(folder))


def read_project(path: Path) -> Project:
    """Read `langgraph.json`. Raises ProjectError."""
    try:
        document = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise ProjectError(f"{path}: {error}") from error
    if not isinstance(document, dict):
        raise ProjectError(f"{path}: must be a JSON object")
    root = path.resolve().parent
    graphs = document.get("graphs")
    if not isinstance(graphs, dict) or not graphs:
        raise ProjectError(f"{path}: 'graphs' must name at least one graph")
    queues = document.get("queues", {})
    if not isinstance(queues, dict) or not all(isinstance(q, str) and q for q in queues.values()):
        raise ProjectError(f"{path}: 'queues' must map graph ids to queue names")
    if unknown := sorted(set(queues) - set(graphs)):
        raise ProjectError(f"{path}: 'queues' names a graph that is not in 'graphs': {unknown[0]}")
    return Project(
        root=root,
        graphs={
            graph_id: _graph_spec(path, graph_id, entry, queues.get(graph_id, DEFAULT_QUEUE))
            for graph_id, entry in graphs.items()
        },
        dependencies=_dependencies(path, root, document.get("dependencies", ["."])),
        env=_environment(path, root, document.get("env", {})),
        defaults=_defaults(),
        thread_ttl=_thread_ttl(path, document.get("checkpointer") or {}),
        http=read_http_config(path, document.get("http")),
    )


def _thread_ttl(path: Path, checkpointer: Any) -> ThreadTtl | None:
    """`{"ttl": {"strategy": …, "default_ttl": <minutes>}}`. `sweep_interval_minutes` is not asked:
    expired threads are found within seconds."""
    ttl = checkpointer.get("ttl") if isinstance(checkpointer, dict) else None
    if ttl is None:
        return None
    minutes = ttl.get("default_ttl") if isinstance(ttl, dict) else None
    strategy = ttl.get("strategy", "delete") if isinstance(ttl, dict) else None
    if strategy not in tuple(TtlStrategy):
        raise ProjectError(f"{path}: 'checkpointer.ttl.strategy' must be delete or keep_latest")
    if minutes is None:
        return None
    if isinstance(minutes, bool) or not isinstance(minutes, (int, float)) or minutes <= 0:
        raise ProjectError(f"{path}: 'checkpointer.ttl.default_ttl' must be minutes above 0")
    return ThreadTtl(float(minutes), TtlStrategy(strategy))


def _graph_spec(path: Path, graph_id: str, entry: Any, queue: str) -> GraphSpec:
    description = None
    if isinstance(entry, dict):
        description = entry.get("description")
        entry = entry.get("path")
    if not isinstance(entry, str) or ":" not in entry:
        raise ProjectError(f"{path}: graph '{graph_id}' must be 'path/to/file.py:variable'")
    return GraphSpec(graph_id, entry, description, queue)


def _dependencies(path: Path, root: Path, entries: Any) -> tuple[Path, ...]:
    """Local folders go on the import path; names of packages are for the installer."""
    if not isinstance(entries, list) or not all(isinstance(e, str) for e in entries):
        raise ProjectError(f"{path}: 'dependencies' must be a list of strings")
    folders = []
    for entry in entries:
        if not entry.startswith("."):
            continue
        folder = (root / entry).resolve()
        if not folder.is_dir():
            raise ProjectError(f"{path}: dependency '{entry}' is not a folder")
        folders += [folder] + ([folder / "src"] if (folder / "src").is_dir() else [])
    return tuple(dict.fromkeys([*folders, root]))


def _environment(path: Path, root: Path, env: Any) -> dict[str, str]:
    if isinstance(env, str):
        file = root / env
        if not file.is_file():
            raise ProjectError(f"{path}: 'env' names a file that is not there: {env}")
        return {name: value for name, value in dotenv_values(file).items() if value is not None}
    if isinstance(env, dict):
        return {str(name): str(value) for name, value in env.items()}
    raise ProjectError(f"{path}: 'env' must be a file name or an object")


def _defaults() -> dict[str, dict[str, Any]]:
    raw = os.environ.get("LANGGRAPH_CONFIG", "").strip()
    if not raw:
        return {}
    try:
        defaults = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise ProjectError(f"LANGGRAPH_CONFIG: {error}") from error
    if not isinstance(defaults, dict) or not all(isinstance(d, dict) for d in defaults.values()):
        raise ProjectError("LANGGRAPH_CONFIG must be a JSON object of objects by graph id")
    return defaults


class GraphRegistry:
    """The loaded graphs of a project, by graph id."""

    def __init__(self, project: Project) -> None:
        self.project = project
        self._loaded: dict[str, Any] = {}

    @classmethod
    def load(cls, project: Project) -> GraphRegistry:
        """Import every graph. Raises ProjectError with the graph's name and the cause."""
        project.apply_environment()
        registry = cls(project)
        for spec in project.graphs.values():
            registry._loaded[spec.graph_id] = _load(project, spec)
        return registry

    def __contains__(self, graph_id: str) -> bool:
        return graph_id in self.project.graphs

    def queue_of(self, graph_id: str) -> str:
        spec = self.project.graphs.get(graph_id)
        return spec.queue if spec else DEFAULT_QUEUE

    def nodes_of(self, graph_id: str) -> frozenset[str] | None:
        """The names of a graph's nodes; None when a factory makes it anew for each run."""
        made = self._loaded.get(graph_id)
        return frozenset(made.nodes) if isinstance(made, Pregel) else None

    @asynccontextmanager
    async def open(self, graph_id: str, config: dict[str, Any]) -> AsyncIterator[Graph]:
        """The compiled graph, built for this config when it is a factory."""
        if graph_id not in self._loaded:
            raise ProjectError(f"Graph '{graph_id}' is not in this project")
        made = self._loaded[graph_id]
        async with contextlib.AsyncExitStack() as stack:
            if _is_factory(made):
                made = _call_factory(made, config)
                if inspect.isawaitable(made):
                    made = await made
                if hasattr(made, "__aenter__"):
                    made = await stack.enter_async_context(made)
                elif hasattr(made, "__enter__"):
                    made = stack.enter_context(made)
            yield _compiled(graph_id, made)

    def read(self, graph_id: str, config: dict[str, Any]) -> Graph:
        """The compiled graph for reading state, never for running nodes."""
        if graph_id not in self._loaded:
            raise ProjectError(f"Graph '{graph_id}' is not in this project")
        made = self._loaded[graph_id]
        if not _is_factory(made):
            return _compiled(graph_id, made)
        return _run_to_end(self._read_async(graph_id, config))

    async def _read_async(self, graph_id: str, config: dict[str, Any]) -> Graph:
        async with self.open(graph_id, config) as graph:
            return graph


def _run_to_end(coroutine: Coroutine[Any, Any, Graph]) -> Graph:
    """Run a factory's coroutine from synchronous code.

    Under gevent it needs a real thread: two greenlets cannot both have a running event loop.
    """
    patched = sys.modules.get("gevent.monkey")
    if patched is not None and patched.is_module_patched("threading"):
        import gevent  # noqa: PLC0415  (only where the web process has it already)

        return gevent.get_hub().threadpool.apply(asyncio.run, (coroutine,))
    return asyncio.run(coroutine)


def _load(project: Project, spec: GraphSpec) -> Any:
    who = f"Graph '{spec.graph_id}'"
    made = load_object(project.root, project.dependencies, spec.target, who)
    if not _is_factory(made):
        try:
            made = _compiled(spec.graph_id, made)
        except ValueError as error:
            raise ProjectError(f"{who} ({spec.target}): {error}") from error
    return made


def _is_factory(made: Any) -> bool:
    return callable(made) and not isinstance(made, (Pregel, StateGraph))


def _call_factory(factory: Callable[..., Any], config: dict[str, Any]) -> Any:
    parameters = inspect.signature(factory).parameters
    if not parameters:
        return factory()
    name = next(iter(parameters))
    if parameters[name].kind is inspect.Parameter.KEYWORD_ONLY:
        return factory(**{name: config})
    return factory(config)


def _compiled(graph_id: str, made: Any) -> Graph:
    if isinstance(made, StateGraph):
        made = made.compile()
    if not isinstance(made, Pregel):
        kind = type(made).__name__
        raise ValueError(
            f"'{graph_id}' must be a graph, a StateGraph or a factory of one, not a {kind}"
        )
    return made
