"""Projects of any layout run without conflicts with Belay's packages, whatever theirs are called:
from the checkout, and from a wheel installed elsewhere."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import sysconfig
import textwrap
import venv
from pathlib import Path

import httpx
import pytest

from belay_server.db.migrate import migrate
from belay_server.dev.embedded import EmbeddedPostgres
from belay_server.dev.process_tree import die_with_parent
from tests.acceptance.playing import refused
from tests.conformance import watched
from tests.long_forms import long_case
from tests.ports import free_port
from tests.servers import LiveServer, running
from tests.waiting import wait_until

ROOT = Path(__file__).parents[3]
#: Names of the project's own packages; Belay itself once used some of them.
NAMES = ("app", "workers", "deploy", "tests", "graphs", "belay")

_HELPER = "WHERE = '{name}'\n"
_AGENT = """
from typing import TypedDict

from langgraph.graph import START, StateGraph

from {package}helper import WHERE


class State(TypedDict, total=False):
    where: str


graph = (
    StateGraph(State)
    .add_node("say", lambda _state: {{"where": WHERE}})
    .add_edge(START, "say")
    .compile()
)
"""


def write(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def package(folder: Path, name: str, *, imported_as: str) -> None:
    """Write a package with a graph that imports another module of the package."""
    write(folder / "__init__.py")
    write(folder / "helper.py", _HELPER.format(name=name))
    write(folder / "agent.py", _AGENT.format(package=imported_as))


def crowded(root: Path) -> dict[str, str]:
    """Write a project with all the names. Return the expected output of each graph."""
    for name in NAMES:
        package(root / name, name, imported_as=f"{name}.")
    write(root / "src" / "helper.py", _HELPER.format(name="src"))
    write(root / "src" / "agent.py", _AGENT.format(package="src."))
    document = {
        "dependencies": ["."],
        "graphs": {name: f"./{name}/agent.py:graph" for name in (*NAMES, "src")},
    }
    write(root / "langgraph.json", json.dumps(document))
    return {name: name for name in (*NAMES, "src")}


def spread(root: Path) -> dict[str, str]:
    """Write a project with two libraries, a `src` layout and installer files."""
    package(root / "libs" / "a" / "app", "libs a", imported_as="app.")
    package(root / "libs" / "b" / "src" / "workers", "libs b", imported_as="workers.")
    write(root / "libs" / "b" / "pyproject.toml", "[project]\nname = 'b'\nversion = '1'\n")
    write(root / "requirements.txt", "langgraph\n")
    package(root / "deploy", "root", imported_as=".")
    document = {
        "dependencies": ["./libs/a", "./libs/b"],
        "graphs": {
            "by_file": "./libs/a/app/agent.py:graph",
            "by_module": "workers.agent:graph",
            "relative": "./deploy/agent.py:graph",
        },
    }
    write(root / "langgraph.json", json.dumps(document))
    return {"by_file": "libs a", "by_module": "libs b", "relative": "root"}


@pytest.fixture(params=[crowded, long_case(spread)])
def project(request, scratch):
    """Return the folder of a project, and the expected output of its graphs."""
    root = scratch / f"project-{request.param.__name__}"
    expected = request.param(root)
    return root, expected


def assert_outputs(url: str, expected: dict[str, str]) -> None:
    with watched(httpx.Client(base_url=url, timeout=60)) as client:
        for graph, where in expected.items():
            answer = client.post("/runs/wait", json={"assistant_id": graph, "input": {}})
            assert answer.json() == {"where": where}, graph


def test_a_project_runs_in_its_own_folder(project, scratch):
    root, expected = project
    live = LiveServer(scratch / f"data-{root.name}", config=None, cwd=root)
    live.start()
    try:
        assert_outputs(live.url, expected)
    finally:
        live.stop()


@pytest.mark.long
def test_a_run_waits_for_a_worker_that_has_its_graph(scratch):
    root = scratch / "project-that-loses-a-graph"
    package(root / "kept", "kept", imported_as="kept.")
    package(root / "lost", "lost", imported_as="lost.")
    graphs = {name: f"./{name}/agent.py:graph" for name in ("kept", "lost")}

    def deploy(*names: str) -> LiveServer:
        document = {"dependencies": ["."], "graphs": {name: graphs[name] for name in names}}
        write(root / "langgraph.json", json.dumps(document))
        return LiveServer(scratch / "data-lost", config=None, cwd=root).start()

    live = deploy("kept", "lost")
    with watched(httpx.Client(base_url=live.url, timeout=60)) as client:
        ended, waiting = (client.post("/threads", json={}).json()["thread_id"] for _ in range(2))
        body = {"assistant_id": "lost", "input": {}}
        client.post(f"/threads/{ended}/runs/wait", json=body)
        later = {**body, "after_seconds": 1}
        run = client.post(f"/threads/{waiting}/runs", json=later).json()["run_id"]
        live.stop()
    assert live.process is not None
    live = deploy("kept")
    with watched(httpx.Client(base_url=live.url, timeout=60)) as client:
        live.wait_for_log(f"run {run} stays pending", 60)
        assert_outputs(live.url, {"kept": "kept"})
        path = f"/threads/{waiting}/runs/{run}"
        assert client.get(path).json()["status"] == "pending"
        for method, part in (("GET", "state"), ("GET", "history"), ("POST", "state")):
            answer = client.request(method, f"/threads/{ended}/{part}", json={"values": {}})
            assert "Graph 'lost'" in refused(answer, 404), part
        assert client.get(f"/threads/{ended}").json()["values"] == {"where": "lost"}
        live.stop()
    live = deploy("kept", "lost")
    try:
        with watched(httpx.Client(base_url=live.url, timeout=60)) as client:
            assert client.get(f"{path}/join").json() == {"where": "lost"}
            assert client.get(f"/threads/{ended}/state").json()["values"] == {"where": "lost"}
    finally:
        live.stop()


# --- installed from a wheel -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Return a virtual environment with Belay's wheel and the packages installed here, without the
    link to the checkout."""
    folder = tmp_path_factory.mktemp("installed")
    wheels = folder / "wheels"
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(wheels)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=100)
    venv.create(folder / "venv", with_pip=False)
    site = next((folder / "venv" / "lib").glob("python*")) / "site-packages"
    # Only the path is added: `.pth` files in it, such as the checkout's, are not read.
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    [wheel] = wheels.glob("*.whl")
    python = folder / "venv" / "bin" / "python"
    # An environment that was made by uv has no pip.
    with_pip = [sys.executable, "-m", "pip", "--python", str(python), "install"]
    with_uv = ["uv", "pip", "install", "--python", str(python)]
    install = with_pip if importlib.util.find_spec("pip") else with_uv
    options = ["--no-deps", "--no-index", "--quiet", str(wheel)]
    subprocess.run([*install, *options], check=True, capture_output=True, timeout=100)
    return folder / "venv"


@pytest.fixture(scope="module")
def empty_database_url(scratch):
    """Yield a separate database: other tests leave runs of graphs that these projects lack."""
    with running(EmbeddedPostgres(scratch / "pg-projects", durable=False)) as url:
        migrate(url, store_index=None)
        yield url


def run_python(installed: Path, code: str, cwd: Path) -> str:
    done = subprocess.run(
        [str(installed / "bin" / "python"), "-c", textwrap.dedent(code)],
        cwd=cwd,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout.strip()


def test_the_wheel_installs_no_generic_package_names(installed, tmp_path):
    code = """
        import importlib.util, sys
        import belay_server, belay_workers
        taken = [n for n in ("app", "workers", "deploy", "tests") if importlib.util.find_spec(n)]
        print(taken, belay_server.__file__.startswith(sys.prefix))
    """
    assert run_python(installed, code, tmp_path) == "[] True"


def test_a_project_runs_with_the_commands_of_the_wheel(
    installed, project, empty_database_url, valkey_url
):
    root, expected = project
    port = free_port()
    environ = {
        k: v for k, v in os.environ.items() if not k.startswith(("BELAY_", "LANGGRAPH", "PYTHON"))
    }
    environ |= {
        "DATABASE_URL": empty_database_url,
        "REDIS_URL": valkey_url,
        "BELAY_BIND": f"127.0.0.1:{port}",
        "BELAY_REDIS_PREFIX": f"{root.name}:",
        "BELAY_CONCURRENCY": "2",
        "BELAY_DRAIN_GRACE_SECONDS": "1",
    }
    belay = str(installed / "bin" / "belay")
    log = root / "log"
    with log.open("ab") as output:
        started = [
            subprocess.Popen(
                [belay, *words],
                cwd=root,
                env=environ,
                stdout=output,
                stderr=output,
                preexec_fn=die_with_parent(os.getpid(), signal.SIGKILL),
            )
            for words in (["web", "--", "--backlog", "64"], ["worker", "--", "-n", "mine@%h"])
        ]
    url = f"http://127.0.0.1:{port}"

    def is_up() -> bool:
        assert all(process.poll() is None for process in started), log.read_text()
        try:
            return httpx.get(f"{url}/ok").status_code == 200
        except httpx.TransportError:
            return False

    try:
        wait_until(is_up, 180, "the web process")
        assert_outputs(url, expected)
    finally:
        for process in started:
            process.send_signal(signal.SIGTERM)
        codes = [process.wait(30) for process in started]
    assert codes == [0, 0]
    for folder in ("app", "workers"):
        assert f"{ROOT}/{folder}" not in log.read_text()


# --- projects that cannot start -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("document", "words"),
    [
        long_case({"graphs": {"a": "./nowhere.py:graph"}}, "there is no file ./nowhere.py"),
        ({"graphs": {"a": "./broken.py:graph"}}, "ModuleNotFoundError: No module named 'nothing'"),
        long_case({"graphs": {"a": "./broken.py"}}, "must be 'path/to/file.py:variable'"),
        long_case("{", "langgraph.json"),
    ],
    ids=["no file", "import fails", "no variable", "invalid JSON"],
)
def test_the_last_line_states_why_a_project_cannot_start(
    scratch, tmp_path, database_url, valkey_url, document, words
):
    write(tmp_path / "broken.py", "import nothing\n")
    text = document if isinstance(document, str) else json.dumps({"dependencies": [], **document})
    write(tmp_path / "langgraph.json", text)
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("BELAY_", "LANGGRAPH"))}
    environ |= {"DATABASE_URL": database_url, "REDIS_URL": valkey_url}
    for command in ("web", "worker", "dev"):
        options = ["--port", str(free_port())] if command == "dev" else []
        environ["PORT"] = str(free_port())
        done = subprocess.run(
            [sys.executable, "-m", "belay_server", command, *options],
            cwd=tmp_path,
            env={**environ, "BELAY_AUTH": "none"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=100,
            check=False,
        )
        assert done.returncode in (2, 3), done.stdout
        last = done.stdout.strip().splitlines()[-1]
        assert words in last, (command, done.stdout)
        assert "Traceback" not in done.stdout, command
