"""The loaded graphs of a project.

A graph may be compiled, a `StateGraph` that is not compiled yet, or a factory of either
(`graphs.project.factories`): sync, async, or a context manager.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import sys
import sysconfig
from collections.abc import AsyncIterator, Callable, Coroutine, MutableMapping
from contextlib import asynccontextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from langgraph.graph.state import StateGraph
from langgraph.pregel import Pregel
from langgraph.store.base import ensure_embeddings

from belay_server.configuration.settings import DEFAULT_QUEUE
from belay_server.graphs.checkpoints.own_checkpointer import load_own_checkpointer
from belay_server.graphs.own_store import load_own_store
from belay_server.graphs.project.factories import GraphFactory, GraphUse
from belay_server.graphs.project.langgraph_json import GraphSpec, Project
from belay_server.graphs.project.loading import ProjectError, load_object
from belay_server.graphs.project.store_section import StoreConfig

_T = TypeVar("_T")
_STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib"))
#: The name of a graph that was compiled without one.
_UNNAMED = "LangGraph"
#: A compiled graph, whatever its state and context.
Graph = Pregel[Any, Any, Any, Any]


class NotAGraph(ValueError):
    """What `langgraph.json` names, or what a factory returns, is no graph."""


class GraphRegistry:
    """The loaded graphs of a project, by graph id."""

    def __init__(self, project: Project) -> None:
        self.project = project
        self._loaded: dict[str, Any] = {}
        #: The JSON schemas of graphs, once they have been made. An entry is removed with its graph.
        self.schemas: MutableMapping[Graph, dict[str, Any]] = WeakKeyDictionary()

    @classmethod
    def load(cls, project: Project) -> GraphRegistry:
        """Import every graph. Raise ProjectError with the name of what failed and the cause."""
        project.apply_environment()
        registry = cls(project)
        for spec in project.graphs.values():
            registry._loaded[spec.graph_id] = _load(project, spec)
        # An error fails the start, not the first item or checkpoint.
        _ = registry.store, registry.own_store, registry.own_checkpointer
        return registry

    @cached_property
    def store(self) -> StoreConfig:
        """The store's configuration with its embedding function. Raises ProjectError."""
        config = self.project.store
        if config.index is None:
            return config
        embed = _load_embed(self.project, config.index["embed"])
        return StoreConfig({**config.index, "embed": embed}, config.ttl)

    @cached_property
    def own_store(self) -> Any:
        """What makes the store of the project's own (`load_own_store`), None without one. Raises
        ProjectError."""
        return None if self.project.store.path is None else load_own_store(self.project)

    @cached_property
    def own_checkpointer(self) -> Any:
        """What makes the checkpointer of the project's own (`load_own_checkpointer`), None without
        one. Raises ProjectError."""
        return None if self.project.checkpointer is None else load_own_checkpointer(self.project)

    def __contains__(self, graph_id: str) -> bool:
        return graph_id in self.project.graphs

    @cached_property
    def graph_ids(self) -> list[str]:
        return list(self.project.graphs)

    def queue_of(self, graph_id: str) -> str:
        spec = self.project.graphs.get(graph_id)
        return spec.queue if spec else DEFAULT_QUEUE

    def has_code(self, filename: str) -> bool:
        """Return whether a file has code of the project: it is in the project's folder or in a
        dependency's, or in an installed package that one of its graphs is in."""
        path = Path(filename)
        if any(path.is_relative_to(folder) for folder in self._installed):
            return True
        folders = (self.project.root, *self.project.dependencies)
        is_library = "site-packages" in path.parts or path.is_relative_to(_STANDARD_LIBRARY)
        return not is_library and any(path.is_relative_to(folder) for folder in folders)

    @cached_property
    def _installed(self) -> list[Path]:
        """Return the files and folders of the packages that graphs are named in as
        `module:variable`."""
        locations = [spec.target.rpartition(":")[0] for spec in self.project.graphs.values()]
        names = {name.partition(".")[0] for name in locations if not name.endswith(".py")}
        modules = [sys.modules[name] for name in names if name in sys.modules]
        files = [Path(module.__file__) for module in modules if module.__file__]
        # A package without `__init__.py` has only folders, which several distributions may share.
        folders = [Path(path) for one in modules if not one.__file__ for path in one.__path__]
        return [file.parent if file.name == "__init__.py" else file for file in files] + folders

    def name_of(self, graph_id: str) -> str:
        """Return the name that the graph was compiled with. If it has none, or a factory makes it,
        return its id."""
        graph = self.compiled(graph_id)
        name = None if graph is None else graph.name
        return name if name and name != _UNNAMED else graph_id

    def compiled(self, graph_id: str) -> Graph | None:
        """Return the graph. None if a factory makes it for each run, or it is not loaded yet."""
        made = self._loaded.get(graph_id)
        return made if isinstance(made, Pregel) else None

    def nodes_of(self, graph_id: str) -> frozenset[str] | None:
        """Return the names of a graph's nodes. None if a factory makes the graph for each run."""
        graph = self.compiled(graph_id)
        return None if graph is None else frozenset(graph.nodes)

    @asynccontextmanager
    async def open(self, graph_id: str, use: GraphUse) -> AsyncIterator[Graph]:
        """Yield the compiled graph. A factory makes it for this use.

        Raise ProjectError for an unknown graph, NotAGraph if a factory returns another object.
        """
        if graph_id not in self._loaded:
            raise ProjectError(f"Graph '{graph_id}' is not in this project")
        made = self._loaded[graph_id]
        async with contextlib.AsyncExitStack() as stack:
            if isinstance(made, GraphFactory):
                made = made(use)
                if inspect.isawaitable(made):
                    made = await made
                if hasattr(made, "__aenter__"):
                    made = await stack.enter_async_context(made)
                elif hasattr(made, "__enter__"):
                    made = stack.enter_context(made)
            yield self._readable(_compiled(graph_id, made))

    def read(self, graph_id: str, use: GraphUse) -> Graph:
        """Return the compiled graph for reading state, never for running nodes. Raise as `open`."""
        if graph_id not in self._loaded:
            raise ProjectError(f"Graph '{graph_id}' is not in this project")
        made = self._loaded[graph_id]
        if not isinstance(made, GraphFactory):
            return self._readable(_compiled(graph_id, made))
        return _run_to_end(self._read_async(graph_id, use))

    def _readable(self, graph: Graph) -> Graph:
        """Let the graph's states have the types that the project allows. Return the graph."""
        if self.project.allowed_types:
            graph._serde_allowlist = (graph._serde_allowlist or set()) | self.project.allowed_types
        return graph

    async def _read_async(self, graph_id: str, use: GraphUse) -> Graph:
        async with self.open(graph_id, use) as graph:
            return graph


def _load_embed(project: Project, target: str) -> Any:
    """Return the embedding function. `target` names a function of a list of texts, sync or async,
    an `Embeddings`, or a model that LangChain finds by name (`openai:text-embedding-3-small`)."""
    who = "'store.index.embed'"
    location = target.rpartition(":")[0]
    if not location.endswith(".py") and "." not in location:
        try:
            return ensure_embeddings(target)
        except (ValueError, ImportError) as error:
            raise ProjectError(f"{who} ({target}): {error}") from error
    embed = load_object(project.root, project.dependencies, target, who)
    return _synchronous(embed) if inspect.iscoroutinefunction(embed) else embed


def _synchronous(embed: Callable[[list[str]], Coroutine[Any, Any, Any]]) -> Any:
    return lambda texts: _run_to_end(embed(texts))


def build_graph(project: Project, spec: GraphSpec) -> str:
    """Import a graph, call its factory if it is one, and return what kind it is.

    Raise ProjectError; NotAGraph if the factory returns another object; the factory's own errors.
    """
    from langgraph.store.memory import InMemoryStore  # noqa: PLC0415  (only for this)

    registry = GraphRegistry(project)
    made = registry._loaded[spec.graph_id] = _load(project, spec)
    if not isinstance(made, GraphFactory):
        return "a graph"
    use = GraphUse("threads.read", {"configurable": {}}, InMemoryStore)
    registry.read(spec.graph_id, use)
    return "a factory"


def _run_to_end(coroutine: Coroutine[Any, Any, _T]) -> _T:
    """Run a project's coroutine from synchronous code.

    Under gevent it needs a real thread: two greenlets cannot both have a running event loop. An
    error that would end the event loop, or the process, is raised as a RuntimeError.
    """

    async def contained() -> _T:
        try:
            return await coroutine
        except Exception:
            raise
        except BaseException as error:
            raise RuntimeError(f"{type(error).__name__}: {error}") from error

    patched = sys.modules.get("gevent.monkey")
    if patched is not None and patched.is_module_patched("threading"):
        import gevent  # noqa: PLC0415  (only where the web process has loaded it)

        # With the context of the request, which has the access of its caller.
        run = contextvars.copy_context().run
        made: _T = gevent.get_hub().threadpool.apply(run, (asyncio.run, contained()))
        return made
    return asyncio.run(contained())


def _load(project: Project, spec: GraphSpec) -> Any:
    who = f"Graph '{spec.graph_id}'"
    made = load_object(project.root, project.dependencies, spec.target, who)
    if inspect.isclass(made):
        raise ProjectError(f"{who} ({spec.target}): is a class, not a graph or a function")
    if callable(made) and not isinstance(made, (Pregel, StateGraph)):
        return GraphFactory(made, f"{who} ({spec.target})")
    try:
        return _compiled(spec.graph_id, made)
    except ValueError as error:
        raise ProjectError(f"{who} ({spec.target}): {error}") from error


def _compiled(graph_id: str, made: Any) -> Graph:
    if isinstance(made, StateGraph):
        made = made.compile()
    if not isinstance(made, Pregel):
        kind = type(made).__name__
        raise NotAGraph(
            f"'{graph_id}' must be a graph, a StateGraph or a factory of one, not a {kind}"
        )
    return made
