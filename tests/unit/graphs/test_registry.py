from __future__ import annotations

import asyncio
import dataclasses
import json
import re
import sys

import pytest
from langgraph.store.memory import InMemoryStore

from belay_server.configuration.project_env import add_project_env
from belay_server.configuration.settings import Settings, SettingsError
from belay_server.domain.webhooks import LOOPBACK
from belay_server.graphs.checkpoints.base_saver import FormatSaver
from belay_server.graphs.project.factories import GraphUse
from belay_server.graphs.project.langgraph_json import read_project
from belay_server.graphs.project.loading import ProjectError
from belay_server.graphs.registry import GraphRegistry
from belay_server.graphs.thread_state import bound
from tests.servers import PROJECT


def write(tmp_path, document, **files):
    for name, text in files.items():
        (tmp_path / f"{name}.py").write_text(text)
    path = tmp_path / "langgraph.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


@pytest.fixture(autouse=True)
def import_path():
    before = list(sys.path)
    yield
    sys.path[:] = before


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("{", "langgraph.json"),
        ("[]", "must be a JSON object"),
        ({}, "'graphs'"),
        ({"graphs": {"a": "no_variable"}}, "graph 'a'"),
        ({"graphs": {"a": 5}}, "graph 'a'"),
        ({"graphs": {"a": "./a.py:g"}, "queues": {"b": "q"}}, "not in 'graphs': b"),
        ({"graphs": {"a": "./a.py:g"}, "isolation": {"b": "shared"}}, "not in 'graphs': b"),
        (
            {"graphs": {"a": "./a.py:g"}, "isolation": {"a": "no"}},
            "to 'process', 'shared' or 'auto'",
        ),
        ({"graphs": {"a": "./a.py:g"}, "dependencies": ["./nowhere"]}, "./nowhere"),
        ({"graphs": {"a": "./a.py:g"}, "env": 5}, "'env' must be"),
        ({"graphs": {"a": "./a.py:g"}, "agent_runs": {"graph": "b"}}, "not in 'graphs': b"),
        ({"graphs": {"a": "./a.py:g"}, "agent_runs": "a"}, "'agent_runs' must be an object"),
        ({"graphs": {"a": "./a.py:g"}, "agent_runs": {}}, "'agent_runs' must be an object"),
        ({"graphs": {"a": "./a.py:g"}, "agent_runs": {"graph": 5}}, "'agent_runs' must be"),
    ],
)
def test_an_invalid_langgraph_json_is_refused_with_the_reason(tmp_path, document, message):
    with pytest.raises(ProjectError, match=message):
        read_project(write(tmp_path, document))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import nothing_of_that_name", "ModuleNotFoundError.*; install it where Belay runs"),
        ("raise RuntimeError('no key')", "RuntimeError: no key"),
        ("other = 1", "has no 'graph'$"),
        ("grahp = 1", "has no 'graph'; did you mean 'grahp'"),
        ("class graph: ...", "is a class, not a graph"),
        ("graph = dict", "is a class, not a graph"),
        ("graph = max", "cannot be called to make a graph"),
        ("graph = 5", "not a int"),
        ("import sys; sys.exit(3)", "SystemExit"),
    ],
)
def test_a_graph_that_cannot_be_loaded_stops_the_start_with_its_cause(tmp_path, source, message):
    path = write(tmp_path, {"graphs": {"broken": "./broken.py:graph"}}, broken=source)
    with pytest.raises(ProjectError, match=message) as raised:
        GraphRegistry.load(read_project(path))
    assert "broken" in str(raised.value)


def test_env_from_a_file_or_a_map_does_not_override_the_operators(tmp_path):
    (tmp_path / ".env").write_text("FROM_FILE=1\nSET=file\n")
    project = read_project(write(tmp_path, {"graphs": {"a": "./a.py:g"}, "env": ".env"}))
    environ = {"SET": "operator"}
    project.apply_environment(environ)
    assert environ == {"SET": "operator", "FROM_FILE": "1"}
    env = {"N": 5, "ON": True, "NOT": None, "LIST": [1, "a"]}
    project = read_project(write(tmp_path, {"graphs": {"a": "./a.py:g"}, "env": env}))
    assert project.env == {"N": "5", "ON": "true", "LIST": '[1,"a"]'}


@pytest.mark.parametrize("env", [".env", {"LANGGRAPH_CONFIG": {"a": {"context": {"by": 7}}}}])
def test_langgraph_config_may_be_in_env(tmp_path, monkeypatch, env):
    (tmp_path / ".env").write_text("""LANGGRAPH_CONFIG='{"a": {"context": {"by": 7}}}'\n""")
    path = write(tmp_path, {"graphs": {"a": "./a.py:g"}, "env": env})
    monkeypatch.delenv("LANGGRAPH_CONFIG", raising=False)
    assert read_project(path).defaults == {"a": {"context": {"by": 7}}}
    monkeypatch.setenv("LANGGRAPH_CONFIG", '{"b": {}}')
    assert read_project(path).defaults == {"b": {}}


GRAPHS = {"a": "./a.py:g"}


def test_the_webhooks_of_a_project_are_read(tmp_path, monkeypatch):
    monkeypatch.setenv("LG_WEBHOOK_TOKEN", "t0ken")
    webhooks = {
        "url": {"disable_loopback": False, "disable_private_ips": True},
        "headers": {"X-From": "a ${{ env.LG_WEBHOOK_TOKEN }} ${{env.LG_WEBHOOK_NAME}}"},
        "allowed_fields": ["run_id"],
    }
    document = {"graphs": GRAPHS, "webhooks": webhooks, "env": {"LG_WEBHOOK_NAME": "me"}}
    found = read_project(write(tmp_path, document)).webhooks
    assert (found.headers, found.fields) == ({"x-from": "a t0ken me"}, {"run_id"})
    assert (found.policy.allows_paths, found.policy.allowed_ranges) == (True, {LOOPBACK})
    found = read_project(write(tmp_path, {"graphs": GRAPHS})).webhooks
    assert (found.policy.allows_paths, found.policy.allowed_ranges, found.fields) == (
        False,
        frozenset(),
        None,
    )


@pytest.mark.parametrize(
    ("webhooks", "message"),
    [
        ([], "'webhooks' must be an object"),
        ({"url": 5}, "'webhooks.url'"),
        ({"url": {"disable_loopback": "no"}}, "'webhooks.url.disable_loopback' must be true"),
        ({"headers": {"x": 5}}, "'webhooks.headers'"),
        ({"headers": {"x": "${{ env.HOME }}"}}, "HOME must start with LG_WEBHOOK_"),
        ({"headers": {"x": "${{ env.MY_X }}"}, "env_prefix": "MY_"}, "MY_X is not set"),
        ({"headers": {"x": "${{ secrets.X }}"}}, "'webhooks.headers.x': a template must be"),
        ({"env_prefix": 5}, "'webhooks.env_prefix'"),
        ({"allowed_fields": "run_id"}, "'webhooks.allowed_fields' must be a list"),
        ({"allowed_fields": ["run_ids"]}, "run_ids is none of assistant_id, "),
    ],
)
def test_an_invalid_webhooks_section_is_refused(tmp_path, webhooks, message):
    with pytest.raises(ProjectError, match=re.escape(message)):
        read_project(write(tmp_path, {"graphs": GRAPHS, "webhooks": webhooks}))


def test_settings_may_be_in_env(tmp_path):
    env = {"DATABASE_URL": "postgresql:///of_the_project", "BELAY_CONCURRENCY": 3}
    path = write(tmp_path, {"graphs": {"a": "./a.py:g"}, "env": env})
    environ = {"BELAY_CONFIG": str(path), "REDIS_URL": "redis://host", "BELAY_CONCURRENCY": "5"}
    add_project_env(environ)
    settings = Settings.from_environ(environ)
    assert (settings.database_url, settings.concurrency) == ("postgresql:///of_the_project", 5)


@pytest.mark.parametrize("env", [[], 5])
def test_an_invalid_env_is_refused_with_the_files_name(tmp_path, env):
    path = write(tmp_path, {"graphs": {"a": "./a.py:g"}, "env": env})
    with pytest.raises(SettingsError, match=rf"{path}: 'env'"):
        add_project_env({"BELAY_CONFIG": str(path)})


def test_a_missing_env_file_is_a_warning(tmp_path):
    path = write(tmp_path, {"graphs": {"a": "./a.py:g"}, "env": ".env.missing"})
    environ = {"BELAY_CONFIG": str(path)}
    add_project_env(environ)
    assert list(environ) == ["BELAY_CONFIG"]
    (warning,) = read_project(path).warnings
    assert warning == f"{path}: 'env' names a file that does not exist: .env.missing"


def test_an_exception_of_several_lines_is_told_in_one(tmp_path):
    source = "raise ValueError('first\\n  second\\nthird')"
    path = write(tmp_path, {"graphs": {"broken": "./broken.py:graph"}}, broken=source)
    with pytest.raises(ProjectError, match=r"ValueError: first second third \(broken\.py:1\)$"):
        GraphRegistry.load(read_project(path))


@pytest.mark.parametrize("document", ["{", "[]"])
def test_another_error_of_the_file_is_left_to_who_reads_the_project(tmp_path, document):
    environ = {"BELAY_CONFIG": str(write(tmp_path, document))}
    add_project_env(environ)
    assert list(environ) == ["BELAY_CONFIG"]


def test_dependencies_are_on_the_import_path_with_their_src(tmp_path):
    (tmp_path / "lib" / "src").mkdir(parents=True)
    path = write(tmp_path, {"graphs": {"a": "./a.py:g"}, "dependencies": ["./lib", "httpx"]})
    assert read_project(path).dependencies == (
        tmp_path / "lib",
        tmp_path / "lib" / "src",
        tmp_path,
    )


def test_a_module_below_src_is_loaded_once_under_its_own_name(tmp_path):
    package = tmp_path / "src" / "my_agent_of_src"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "shared.py").write_text("TOKEN = object()\n")
    (package / "agent.py").write_text(
        "from langgraph.graph import START, StateGraph\n"
        "import my_agent_of_src.shared\n"
        "from .shared import TOKEN\n"
        "assert TOKEN is my_agent_of_src.shared.TOKEN\n"
        "name = __name__\n"
        "graph = StateGraph(dict).add_node('n', lambda s: s).add_edge(START, 'n')\n"
    )
    path = write(tmp_path, {"graphs": {"a": "./src/my_agent_of_src/agent.py:graph"}})
    GraphRegistry.load(read_project(path))
    assert "my_agent_of_src.agent" in sys.modules
    assert "src.my_agent_of_src.agent" not in sys.modules


def test_graphs_are_routed_to_their_queues():
    project = read_project(PROJECT)
    assert project.queues == ["runs", "heavy", "parents"]
    registry = GraphRegistry(project)
    assert registry.queue_of("heavy") == "heavy"
    assert registry.queue_of("counter") == "runs"


@pytest.mark.parametrize(
    ("graph_id", "expected"),
    [
        ("counter", 2),
        ("uncompiled", 2),
        ("made", 11),
        ("made_async", 21),
        ("made_with_config", 31),
        ("made_context", 41),
    ],
)
def test_a_graph_may_be_compiled_uncompiled_or_a_factory(graph_id, expected):
    registry = GraphRegistry.load(read_project(PROJECT))
    config = {"configurable": {}}
    use = GraphUse("threads.read", config, store=InMemoryStore)

    async def run():
        async with registry.open(graph_id, use) as graph:
            return await graph.ainvoke({"count": 1}, config)

    assert asyncio.run(run()) == {"count": expected}
    assert registry.read(graph_id, use).nodes


def test_the_name_of_a_graph_is_the_one_it_was_compiled_with(tmp_path):
    source = (
        "from langgraph.graph import START, StateGraph\n"
        "builder = StateGraph(dict).add_node('n', lambda s: s).add_edge(START, 'n')\n"
        "named, plain = builder.compile(name='My Agent'), builder.compile()\n"
        "def factory(): return named\n"
    )
    names = {"a": "named", "b": "plain", "c": "builder", "d": "factory"}
    graphs = {graph_id: f"./names.py:{variable}" for graph_id, variable in names.items()}
    registry = GraphRegistry.load(read_project(write(tmp_path, {"graphs": graphs}, names=source)))
    assert [registry.name_of(graph_id) for graph_id in names] == ["My Agent", "b", "c", "d"]


@pytest.mark.parametrize("graph_id", ["counter", "made", "uncompiled"])
def test_states_may_have_the_types_that_the_project_allows(graph_id):
    allowed = ("my_models", "Order")
    project = dataclasses.replace(read_project(PROJECT), allowed_types=frozenset({allowed}))
    use = GraphUse("threads.read", {"configurable": {}}, store=InMemoryStore)
    saver = FormatSaver(None)
    graph = bound(GraphRegistry.load(project).read(graph_id, use), saver)
    graph._apply_checkpointer_allowlist(saver)
    assert allowed in saver.serde._allowed_msgpack_modules


def test_langgraph_config_sets_defaults_by_graph(monkeypatch):
    monkeypatch.setenv("LANGGRAPH_CONFIG", '{"counter": {"configurable": {"by": 7}}}')
    assert read_project(PROJECT).defaults == {"counter": {"configurable": {"by": 7}}}
    monkeypatch.setenv("LANGGRAPH_CONFIG", "[]")
    with pytest.raises(ProjectError, match="LANGGRAPH_CONFIG"):
        read_project(PROJECT)


def test_a_dependency_that_is_not_installed_is_a_warning(tmp_path):
    entries = [
        ".",
        "langgraph>=1",
        "no-package-of-that-name[extra]>=2",
        "langchain_core",
        "no_other",
    ]
    document = {"graphs": {"agent": "./agent.py:graph"}, "dependencies": entries}
    missing = [
        warning.partition("dependency ")[2].partition(" is")[0]
        for warning in read_project(write(tmp_path, document)).warnings
    ]
    assert missing == ["'no-package-of-that-name'", "'no_other'"]
