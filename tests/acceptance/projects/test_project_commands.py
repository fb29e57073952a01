"""Test `belay new`, `belay validate`, and that `belay dev` loads a changed project again."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import watchfiles

from belay_server.dev.reload import CodeChanges, InstalledPackages
from tests.conformance import watched
from tests.debugger import Debugger
from tests.ports import free_port
from tests.waiting import wait_until

GRAPH = """
import asyncio
from pathlib import Path
from typing import TypedDict
from langgraph.graph import START, StateGraph

class State(TypedDict, total=False):
    started: str
    answer: str
    notes: list[str]

async def first(state: State):
    return {"notes": ["first of VERSION"]}

async def second(state: State):
    if "started" in state:
        Path(state["started"]).touch()
        if "VERSION" == "v1":
            await asyncio.sleep(600)
    return {"answer": "VERSION", "notes": [*state["notes"], "second of VERSION"]}

graph = (
    StateGraph(State).add_node("first", first).add_node("second", second)
    .add_edge(START, "first").add_edge("first", "second").compile()
)
"""


def belay(*words: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "belay_server", *map(str, words)]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )


def project(folder: Path, **document: object) -> Path:
    (folder / "agent.py").write_text(GRAPH)
    path = folder / "langgraph.json"
    path.write_text(json.dumps({"graphs": {"agent": "./agent.py:graph"}, **document}))
    return path


def test_a_new_project_is_valid(tmp_path):
    made = belay("new", tmp_path / "mine")
    assert (made.returncode, made.stderr) == (0, "")
    checked = belay("validate", cwd=tmp_path / "mine")
    assert checked.returncode == 0, checked.stderr
    assert "graph 'agent' (./graphs/agent.py:graph): a graph" in checked.stdout
    quiet = belay("validate", "--quiet", cwd=tmp_path / "mine")
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")
    again = belay("new", tmp_path / "mine")
    assert again.returncode == 2
    assert "has a project already: embeddings.py, graphs, langgraph.json" in again.stderr


def test_a_new_project_is_made_beside_a_virtual_environment(tmp_path):
    (tmp_path / ".venv").mkdir()
    assert belay("new", ".", cwd=tmp_path).returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".venv",
        "embeddings.py",
        "graphs",
        "langgraph.json",
    ]


def test_every_error_of_a_project_is_reported(tmp_path):
    path = project(
        tmp_path,
        graphs={"agent": "./agent.py:graph", "no": "./agent.py:nothing", "gone": "./gone.py:g"},
        http={"app": "./agent.py:GRAPHS"},
        auth={"path": "./agent.py:graph"},
        dependancies=[],
    )
    checked = belay("validate", "--config", path)
    assert checked.returncode == 1
    assert "graph 'agent' (./agent.py:graph): a graph" in checked.stdout
    assert "did you mean 'dependencies'" in checked.stdout
    for error in ("has no 'nothing'", "there is no file ./gone.py", "no 'GRAPHS'", "langgraph_sdk"):
        assert error in checked.stderr
    assert len(checked.stderr.splitlines()) == 4


FACTORIES = """
from typing import TypedDict
from langgraph.graph import START, StateGraph

class State(TypedDict):
    note: str

def node(state):
    return {"note": "cooked"}

def factory(config):
    return StateGraph(State).add_node("node", node).add_edge(START, "node")

def choosy(config):
    return {"known": factory(config)}[config["configurable"]["kitchen"]]
"""


def test_factories_are_called(tmp_path):
    targets = ("node", "factory", "choosy")
    path = project(tmp_path, graphs={name: f"./agent.py:{name}" for name in targets})
    (tmp_path / "agent.py").write_text(FACTORIES)
    checked = belay("validate", "--config", path)
    assert checked.returncode == 1
    assert checked.stdout.splitlines() == [
        "graph 'factory' (./agent.py:factory): a factory",
        "graph 'choosy' (./agent.py:choosy): a factory, which fails without a run's config: "
        "KeyError: 'kitchen'",
    ]
    assert checked.stderr.splitlines() == [
        "error: 'node' must be a graph, a StateGraph or a factory of one, not a dict"
    ]


def test_a_thread_of_the_project_does_not_keep_the_check_from_ending(tmp_path):
    source = (
        "import threading\n\nthreading.Thread(target=threading.Event().wait).start()\ngraph = None"
    )
    (tmp_path / "agent.py").write_text(source)
    (tmp_path / "langgraph.json").write_text('{"graphs": {"agent": "./agent.py:graph"}}')
    assert belay("validate", cwd=tmp_path).returncode == 1


@pytest.mark.parametrize("words", [(), ("--config", "nowhere.json")])
def test_a_missing_langgraph_json_is_named(tmp_path, words):
    checked = belay("validate", *words, cwd=tmp_path)
    assert checked.returncode == 2
    assert "langgraph.json" in checked.stderr or "nowhere.json" in checked.stderr


def test_a_changed_project_is_loaded_again_and_its_runs_continue(tmp_path, make_server):
    path = project(tmp_path)
    code, started = tmp_path / "agent.py", tmp_path / "started"
    code.write_text(GRAPH.replace("VERSION", "v1"))
    server = make_server("reloading", config=path).start("--reload")
    try:
        with watched(httpx.Client(base_url=server.url, timeout=60)) as client:
            thread_id = client.post("/threads", json={}).json()["thread_id"]
            body = {"assistant_id": "agent", "input": {"started": str(started)}}
            run = client.post(f"/threads/{thread_id}/runs", json=body).json()
            wait_until(started.exists, 60, "the run is in its second node")

            code.write_text("import time; time.sleep(600)")
            server.wait_for_log("agent.py changed", 60)
            code.write_text("this is not Python")  # also while the change before is checked
            log = server.wait_for_log("keeping the previous code", 60)
            assert "error: Graph 'agent' (./agent.py:graph): NameError" in log
            # The server and the run go on.
            path = f"/threads/{thread_id}/runs/{run['run_id']}"
            assert client.get(path).json()["status"] == "running"
            other = {"assistant_id": "agent", "input": {}}
            assert client.post("/runs/wait", json=other).json()["answer"] == "v1"
            code.write_text(GRAPH.replace("VERSION", "v2"))

            def values():
                try:
                    joined = client.get(f"/threads/{thread_id}/runs/{run['run_id']}/join")
                    return joined.json() if joined.status_code == 200 else None
                except httpx.HTTPError:
                    return None  # the web process is being started again

            # The run continues with its second node, which it repeats.
            found = wait_until(values, 90, "the run continues with the new code")
        assert found["answer"] == "v2"
        assert found["notes"] == ["first of v1", "second of v2"]
        assert "agent.py changed" in server.wait_for_log("loading the project again")
    finally:
        server.stop()


DEBUGGED = """
from typing import TypedDict
from langgraph.graph import START, StateGraph

class State(TypedDict, total=False):
    answer: int

async def think(state: State):
    doubt = 41
    return {"answer": doubt + 1}

def say(state: State):
    said = state["answer"]
    return {"answer": said}

graph = (
    StateGraph(State).add_node("think", think).add_node("say", say)
    .add_edge(START, "think").add_edge("think", "say").compile()
)
"""


@pytest.mark.long
@pytest.mark.parametrize(("line", "name"), [(10, "doubt"), (14, "said")], ids=["async", "sync"])
def test_a_debugger_stops_in_a_node_and_a_cancel_ends_it(tmp_path, make_server, line, name):
    path = project(tmp_path)
    (tmp_path / "agent.py").write_text(DEBUGGED)
    port = free_port()
    server = make_server(f"debugged-{name}", config=path).start("--debug-port", str(port))
    try:
        with watched(httpx.Client(base_url=server.url, timeout=60)) as client:
            thread_id = client.post("/threads", json={}).json()["thread_id"]
            runs = f"/threads/{thread_id}/runs"
            run = {"assistant_id": "agent", "input": {}}
            assert client.post(f"{runs}/wait", json=run).json() == {"answer": 42}
            with Debugger(port) as debugger:
                debugger.attach(tmp_path / "agent.py", line)
                for is_cancelled in (False, True):
                    run_id = client.post(runs, json=run).json()["run_id"]
                    stopped = debugger.wait_for_event("stopped")["threadId"]
                    frames = debugger.request("stackTrace", threadId=stopped)["stackFrames"]
                    found = debugger.request(
                        "evaluate", expression=name, frameId=frames[0]["id"], context="watch"
                    )
                    assert found["result"] in ("41", "42")
                    if not is_cancelled:
                        debugger.request("continue", threadId=stopped)
                        assert client.get(f"{runs}/{run_id}/join").json() == {"answer": 42}
                        continue
                    client.post(f"{runs}/{run_id}/cancel?wait=1").raise_for_status()
                    assert client.get(f"{runs}/{run_id}").json()["status"] == "interrupted"
            # The child that was killed at its breakpoint has a successor, to which one can attach.
            wait_until(lambda: can_connect(port), 60, "another debugger can attach")
            assert client.post(f"{runs}/wait", json=run).json() == {"answer": 42}
    finally:
        server.stop()


def test_a_debugger_needs_a_free_port(tmp_path):
    path = project(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused = belay("dev", "--config", path, "--port", free_port(), "--debug-port", port)
    assert refused.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}" in refused.stderr
    assert "choose another with --debug-port" in refused.stderr


def can_connect(port):
    try:
        with Debugger(port):
            return True
    except OSError:
        return False


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("agent.py", True),
        ("pkg/tools.py", True),
        ("langgraph.json", True),
        (".env", True),
        (".env.local", True),
        ("data.json", False),
        ("pkg/langgraph.json", False),
        ("notes.txt", False),
        (".venv/lib/x.py", False),
        ("node_modules/x.py", False),
        ("pkg/__pycache__/x.py", False),
        (".belay/x.py", False),
        ("own-venv/lib/x.py", False),
        ("own-venv/pyvenv.cfg", False),
        ("tests/test_agent.py", False),
        ("tests/helpers.py", False),
        ("pkg/tests/test_x.py", False),
        ("test_agent.py", False),
        ("agent_test.py", False),
        ("conftest.py", False),
        ("test/agent.py", True),
        ("test_graph.py", True),
        ("contest.py", True),
    ],
)
def test_only_the_code_and_the_configuration_are_watched(tmp_path, name, counts):
    (tmp_path / "own-venv").mkdir()
    (tmp_path / "own-venv/pyvenv.cfg").touch()
    project(tmp_path, graphs={"a": "./test/agent.py:graph", "b": "./test_graph.py:graph"})
    changes = CodeChanges(tmp_path / "langgraph.json", tmp_path / ".belay")
    assert changes(watchfiles.Change.modified, str(tmp_path / name)) == counts


def test_a_folder_that_is_copied_into_the_project_is_noticed(tmp_path):
    changes = CodeChanges(tmp_path / "langgraph.json", tmp_path / ".belay")
    for name in ("pkg/inner/tools.py", "data/notes.txt", "tests/test_x.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.touch()
    added = watchfiles.Change.added
    seen = [name for name in ("pkg", "data", "tests") if changes(added, str(tmp_path / name))]
    assert seen == ["pkg"]
    assert not changes(watchfiles.Change.modified, str(tmp_path / "pkg"))


def test_installed_packages_are_noticed_when_the_installer_has_ended(tmp_path):
    folder = tmp_path / "site-packages"
    folder.mkdir()
    packages = InstalledPackages(
        [str(folder), str(tmp_path / "lib"), str(tmp_path / "no-packages")]
    )
    assert not packages.have_changed()
    for number, name in enumerate(("first", "second")):
        (folder / name).mkdir()
        os.utime(folder, ns=(0, number))
        assert not packages.have_changed()
    assert packages.have_changed()
    assert not packages.have_changed()
