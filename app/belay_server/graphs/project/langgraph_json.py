"""The project: `langgraph.json` and its environment.

It is read as LangGraph's own CLI reads it: `graphs` (`path:variable`, `module:variable`, or an
object with `path`), `dependencies` on the import path, `env` (a file or a map), `store`,
`checkpointer`, `auth`, `webhooks`, `http`. In addition, `queues` routes a graph's runs to a Celery
queue of its own, and `agent_runs` names the graph that serves the second HTTP API.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import orjson

from belay_server.configuration.project_env import read_env
from belay_server.configuration.settings import DEFAULT_QUEUE, ISOLATION_WORDS
from belay_server.domain.headers import HeaderPatterns
from belay_server.domain.threads import ThreadTtl, TtlStrategy
from belay_server.graphs.project.auth_section import (
    AuthCacheConfig,
    read_auth_cache,
    read_auth_openapi,
    read_auth_path,
)
from belay_server.graphs.project.http_section import HttpConfig, read_http_config
from belay_server.graphs.project.keys import check_keys
from belay_server.graphs.project.loading import ProjectError
from belay_server.graphs.project.store_section import StoreConfig, read_store_config
from belay_server.graphs.project.webhooks_section import WebhooksConfig, read_webhooks_config

#: The name at the start of a requirement, such as `langchain[openai]>=1`. Folders begin with a dot.
_PACKAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(?=$|[\s\[<>=!~;@])")


@dataclass(frozen=True, slots=True)
class GraphSpec:
    """One entry of `graphs`."""

    graph_id: str
    target: str
    description: str | None
    queue: str
    #: Whether its runs share processes (`isolation`); None: as the operator has set.
    isolation: str | None = None


@dataclass(frozen=True, slots=True)
class Project:
    """The content of `langgraph.json`. `root` is its folder."""

    root: Path
    graphs: Mapping[str, GraphSpec]
    dependencies: tuple[Path, ...]
    env: Mapping[str, str]
    #: What a start says about keys that have no effect and graphs that are not served.
    warnings: tuple[str, ...] = ()
    #: Defaults of a graph's config and context, by graph id (LANGGRAPH_CONFIG).
    defaults: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    #: `checkpointer.path`: the name of the project's own checkpointer.
    checkpointer: str | None = None
    #: The TTL of threads that are created without one (`checkpointer.ttl`).
    thread_ttl: ThreadTtl | None = None
    #: Types that states may have besides LangChain's and those of the graph's schema, each the
    #: parts of a module and a name (`checkpointer.serde.allowed_msgpack_modules`).
    allowed_types: frozenset[tuple[str, ...]] = frozenset()
    webhooks: WebhooksConfig = field(default_factory=WebhooksConfig)
    #: `store`. The `embed` of its index is the name of the function.
    store: StoreConfig = field(default_factory=StoreConfig)
    #: `auth.path`: the name of the project's `langgraph_sdk.Auth`.
    auth: str | None = None
    #: `auth.cache`: for how long its callers are remembered.
    auth_cache: AuthCacheConfig | None = None
    #: `auth.openapi`: what the OpenAPI document says about authentication.
    openapi: Mapping[str, Any] = field(default_factory=dict)
    #: The configuration of the HTTP API (`http`).
    http: HttpConfig = field(default_factory=HttpConfig)
    #: The graph that serves agent runs (`agent_runs`). None: there are no agent runs.
    agent_runs_graph: str | None = None

    @property
    def configurable_headers(self) -> HeaderPatterns:
        """The headers of a request that its runs can read."""
        return self.http.configurable_headers

    def url_in(self, internal_url: str) -> str:
        """Return where this project's API is, in a web process at `internal_url`."""
        return internal_url.rstrip("/") + self.http.mount_prefix

    @property
    def queues(self) -> list[str]:
        """Every queue that a graph of this project uses, and the default one, which is first."""
        named = sorted({spec.queue for spec in self.graphs.values()} - {DEFAULT_QUEUE})
        return [DEFAULT_QUEUE, *named]

    def apply_environment(self, environ: dict[str, str] | None = None) -> None:
        """Put the dependencies on the import path and set the project's environment variables.

        A variable that is already set keeps its value.
        """
        target = os.environ if environ is None else environ
        for name, value in self.env.items():
            target.setdefault(name, value)
        for folder in reversed(self.dependencies):
            if str(folder) not in sys.path:
                sys.path.insert(0, str(folder))


def read_project(path: Path) -> Project:
    """Read `langgraph.json`. Raise ProjectError if it, or LANGGRAPH_CONFIG, is invalid."""
    try:
        document = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise ProjectError(f"{path}: {error}") from error
    if not isinstance(document, dict):
        raise ProjectError(f"{path}: must be a JSON object")
    warnings = check_keys(path, document)
    root = path.resolve().parent
    graphs = document.get("graphs")
    if not isinstance(graphs, dict) or not graphs:
        raise ProjectError(f"{path}: 'graphs' must name at least one graph")
    queues = document.get("queues", {})
    if not isinstance(queues, dict) or not all(isinstance(q, str) and q for q in queues.values()):
        raise ProjectError(f"{path}: 'queues' must map graph ids to queue names")
    if unknown := sorted(set(queues) - set(graphs)):
        raise ProjectError(f"{path}: 'queues' names a graph that is not in 'graphs': {unknown[0]}")
    isolation = _isolation(path, graphs, document.get("isolation", {}))
    python = {name: entry for name, entry in graphs.items() if not _is_javascript(entry)}
    warnings += [
        f"{path}: graph '{name}' is JavaScript and is not served"
        for name in graphs.keys() - python.keys()
    ]
    if not python:
        raise ProjectError(f"{path}: 'graphs' must name at least one graph in Python")
    if document.get("ui"):
        warnings.append(f"{path}: the user interface components of 'ui' are not served")
    warnings += _missing_packages(path, document.get("dependencies"))
    env = _environment(path, root, document.get("env", {}))
    if isinstance(named := document.get("env"), str) and not (root / named).is_file():
        warnings.append(f"{path}: 'env' names a file that does not exist: {named}")
    if isinstance(store := document.get("store"), dict) and store.get("path"):
        unused = [f"store.{key}" for key in ("index", "ttl") if store.get(key)]
        warnings += [f"{path}: '{key}' has no effect beside 'store.path'" for key in unused]
    environ = {**env, **os.environ}
    return Project(
        root=root,
        warnings=tuple(warnings),
        graphs={
            graph_id: _graph_spec(
                path, graph_id, entry, queues.get(graph_id, DEFAULT_QUEUE), isolation.get(graph_id)
            )
            for graph_id, entry in python.items()
        },
        dependencies=_dependencies(path, root, document.get("dependencies", ["."])),
        env=env,
        defaults=_defaults(environ),
        checkpointer=_own_checkpointer(path, document.get("checkpointer") or {}),
        thread_ttl=_thread_ttl(path, _with_ttl(document.get("checkpointer") or {}, environ)),
        allowed_types=_allowed_types(path, document.get("checkpointer") or {}),
        auth=read_auth_path(path, document.get("auth")),
        auth_cache=read_auth_cache(path, document.get("auth")),
        openapi=read_auth_openapi(path, document.get("auth")),
        http=_http(path, document.get("http"), environ),
        agent_runs_graph=_agent_runs_graph(path, graphs, document.get("agent_runs")),
        store=read_store_config(path, document.get("store") or {}),
        webhooks=read_webhooks_config(path, document.get("webhooks"), environ),
    )


def _isolation(path: Path, graphs: Mapping[str, Any], isolation: Any) -> Mapping[str, str]:
    """Return where the runs of each graph are executed, as `isolation` says."""
    if not isinstance(isolation, dict) or not set(isolation.values()) <= set(ISOLATION_WORDS):
        words = "{}, {} or {}".format(*(f"'{word}'" for word in ISOLATION_WORDS))
        raise ProjectError(f"{path}: 'isolation' must map graph ids to {words}")
    if unknown := sorted(set(isolation) - set(graphs)):
        raise ProjectError(
            f"{path}: 'isolation' names a graph that is not in 'graphs': {unknown[0]}"
        )
    return isolation


def _own_checkpointer(path: Path, checkpointer: Any) -> str | None:
    """Return `checkpointer.path`."""
    named = checkpointer.get("path") if isinstance(checkpointer, dict) else None
    if named is not None and (not isinstance(named, str) or ":" not in named):
        raise ProjectError(f"{path}: 'checkpointer.path' must be 'path/to/file.py:variable'")
    return named


def _allowed_types(path: Path, checkpointer: Any) -> frozenset[tuple[str, ...]]:
    """Return the types of `{"serde": {"allowed_msgpack_modules": [["module", "Name"], …]}}`."""
    serde = checkpointer.get("serde") or {} if isinstance(checkpointer, dict) else {}
    who = f"{path}: 'checkpointer.serde"
    if not isinstance(serde, dict):
        raise ProjectError(f"{who}' must be an object")
    if serde.get("pickle_fallback"):
        raise ProjectError(f"{who}.pickle_fallback' is not supported: Belay never unpickles")
    allowed = serde.get("allowed_msgpack_modules") or []
    if allowed is True:
        raise ProjectError(
            f"{who}.allowed_msgpack_modules' must be a list of types; to read any type, set "
            "LANGGRAPH_STRICT_MSGPACK=false in the environment of all processes"
        )
    if not isinstance(allowed, list) or not all(map(_names_a_type, allowed)):
        raise ProjectError(f'{who}.allowed_msgpack_modules\' must be a list of ["module", "Name"]')
    return frozenset(tuple(one) for one in allowed)


def _names_a_type(one: Any) -> bool:
    is_words = isinstance(one, list) and all(isinstance(word, str) for word in one)
    return is_words and len(one) >= 2


def _is_javascript(entry: Any) -> bool:
    target = entry.get("path") if isinstance(entry, dict) else entry
    location = target.rpartition(":")[0] if isinstance(target, str) else ""
    return location.endswith((".js", ".mjs", ".cjs", ".jsx", ".ts", ".mts", ".cts", ".tsx"))


def _agent_runs_graph(path: Path, graphs: dict[str, Any], agent_runs: Any) -> str | None:
    """Return the graph id of `{"graph": "<graph id>"}`."""
    if agent_runs is None:
        return None
    named = agent_runs.get("graph") if isinstance(agent_runs, dict) else None
    if not isinstance(named, str):
        raise ProjectError(f"{path}: 'agent_runs' must be an object with the id of a 'graph'")
    if named not in graphs:
        raise ProjectError(f"{path}: 'agent_runs' names a graph that is not in 'graphs': {named}")
    return named


def _with_ttl(checkpointer: Any, environ: Mapping[str, str]) -> Any:
    """Return `checkpointer` with the TTL of LANGGRAPH_THREAD_TTL, which has precedence."""
    ttl = _json_variable("LANGGRAPH_THREAD_TTL", environ)
    if ttl is None or not isinstance(checkpointer, dict):
        return checkpointer
    return {**checkpointer, "ttl": ttl}


def _http(path: Path, http: Any, environ: Mapping[str, str]) -> HttpConfig:
    """Read `http`, with CORS_CONFIG and MOUNT_PREFIX, which have precedence. An error names the
    file or the variable."""
    config = read_http_config(path, http)
    found = {
        "CORS_CONFIG": ("cors", _json_variable("CORS_CONFIG", environ)),
        "MOUNT_PREFIX": ("mount_prefix", environ.get("MOUNT_PREFIX", "").strip() or None),
    }
    merged = dict(http or {})
    for variable, (name, value) in found.items():
        if value is not None:
            merged[name] = value
            config = read_http_config(Path(variable), merged)
    return config


def _json_variable(name: str, environ: Mapping[str, str]) -> dict[str, Any] | None:
    raw = environ.get(name, "").strip()
    if not raw:
        return None
    try:
        found = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise ProjectError(f"{name}: {error}") from error
    if not isinstance(found, dict):
        raise ProjectError(f"{name} must be a JSON object")
    return found


def _thread_ttl(path: Path, checkpointer: Any) -> ThreadTtl | None:
    """Read `{"ttl": {"strategy": …, "default_ttl": <minutes>}}`. Return None without a TTL.

    `sweep_interval_minutes` is ignored: expired threads are found within seconds.
    """
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


def _graph_spec(
    path: Path, graph_id: str, entry: Any, queue: str, isolation: str | None
) -> GraphSpec:
    description = None
    if isinstance(entry, dict):
        description = entry.get("description")
        entry = entry.get("path")
    if not isinstance(entry, str) or ":" not in entry:
        raise ProjectError(f"{path}: graph '{graph_id}' must be 'path/to/file.py:variable'")
    return GraphSpec(graph_id, entry, description, queue, isolation)


def _dependencies(path: Path, root: Path, entries: Any) -> tuple[Path, ...]:
    """Return the folders for the import path. Names of packages are for the installer."""
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


def _missing_packages(path: Path, entries: Any) -> list[str]:
    """Return a warning for each dependency on a package that is not installed."""
    warnings = []
    for entry in entries if isinstance(entries, list) else []:
        name = _PACKAGE.match(entry) if isinstance(entry, str) else None
        if name is None:
            continue
        try:
            metadata.distribution(name.group())
        except metadata.PackageNotFoundError:
            warnings.append(
                f"{path}: dependency '{name.group()}' is not installed where Belay runs: "
                f"{sys.prefix}"
            )
    return warnings


def _environment(path: Path, root: Path, env: Any) -> dict[str, str]:
    try:
        return read_env(root, env)
    except ValueError as error:
        raise ProjectError(f"{path}: {error}") from error


def _defaults(environ: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    defaults = _json_variable("LANGGRAPH_CONFIG", environ) or {}
    if not all(isinstance(of_graph, dict) for of_graph in defaults.values()):
        raise ProjectError("LANGGRAPH_CONFIG must be a JSON object of objects by graph id")
    return defaults
