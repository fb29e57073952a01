"""Run `belay dev`: the API, a worker and the embedded servers as one process tree."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import IO

import orjson

from belay_server.configuration.command_lines import cli_command, web_command, worker_command
from belay_server.configuration.exposure import refuse_open_server
from belay_server.configuration.project_env import add_project_env
from belay_server.configuration.setting_aliases import with_own_names
from belay_server.configuration.settings import DEFAULT_QUEUE, EXAMPLE_CONFIG, config_path
from belay_server.dev.embedded import EmbeddedPostgres, EmbeddedValkey, wait_until_ready
from belay_server.dev.process_tree import ProcessTree, Program, say
from belay_server.dev.reload import CodeChanges, watch, watch_packages

_READY_SECONDS = 60.0
#: Settings of development. Active runs are put back soon after the stop; they continue at the next
#: start.
_DEFAULTS = {"BELAY_DRAIN_GRACE_SECONDS": "1", "BELAY_CORS_PRIVATE_NETWORK": "1"}
#: Connections to Postgres besides one for each run: those of web, worker, psql and so on.
_OTHER_CONNECTIONS = 200


class PortBusy(Exception):
    """The port cannot be bound, most likely because another program listens on it."""


class DebuggerMissing(Exception):
    """`--debug-port` was given, and debugpy is not installed."""


class FolderBusy(Exception):
    """Another `belay dev` uses the data folder."""


class StartFailed(Exception):
    """The server cannot start with this project, these settings or this schema."""


@dataclass(frozen=True, slots=True)
class DevOptions:
    """The options of `belay dev`. `config` and `concurrency`, if set, override the environment."""

    config: Path | None
    host: str
    port: int
    data_dir: Path
    concurrency: int | None
    #: The port at which a debugger may attach to the code of the graphs.
    debug_port: int | None = None
    #: Whether the project is loaded again when one of its files changes.
    reload: bool = True


def run_dev(options: DevOptions, environ: Mapping[str, str]) -> None:
    """Run until SIGINT or SIGTERM. No process is left running.

    Raises PortBusy, FolderBusy, DebuggerMissing, SettingsError, EmbeddedUnavailable or StartFailed.
    """
    _refuse_busy_port(options.host, options.port, "--port")
    options = _for_debugger(options)
    # Other users must not read the files of this process and of the servers that it starts.
    os.umask(0o077)
    env = _environment(options, environ)
    # The processes read `env` of the project by themselves, and again after it has changed.
    effective = dict(env)
    add_project_env(effective)
    effective = with_own_names(effective)
    refuse_open_server([options.host], effective)
    queues = _queues(Path(env["BELAY_CONFIG"]))

    data_dir = options.data_dir.resolve()
    is_embedded = not (effective.get("REDIS_URL") and effective.get("DATABASE_URL"))
    lock = _lock_folder(data_dir) if is_embedded else None
    tree = ProcessTree()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: tree.request_stop())
    postgres: EmbeddedPostgres | None = None
    try:
        if not effective.get("REDIS_URL"):
            env["REDIS_URL"] = _start_valkey(tree, data_dir)
        if not effective.get("DATABASE_URL"):
            connections = _OTHER_CONNECTIONS + (options.concurrency or 0)
            postgres = EmbeddedPostgres(data_dir, connections=connections)
            env["DATABASE_URL"] = _start_postgres(tree, postgres)
            say("belay", f"data in {postgres.data} and {data_dir}")
            if effective.get("BELAY_AUTH") == "keys":
                url = env["DATABASE_URL"]
                say("belay", f"create a key: DATABASE_URL='{url}' belay keys create --name me")
        if not is_embedded:
            say("belay", "using the servers of DATABASE_URL and REDIS_URL")
        _start_belay(tree, env, queues)
        config = Path(env["BELAY_CONFIG"])
        _announce_when_ready(tree, options, config, _mount_prefix(config, effective))
        if options.reload:
            tree.check = Program(
                "check", cli_command("validate", "--quiet", "--config", str(config)), env
            )
            changes = CodeChanges(config, data_dir)
            watch(_folders(config), changes, tree.request_reload, tree.stopping)
            watch_packages(lambda: tree.waits_for_change, tree.request_reload, tree.stopping)
        tree.run()
        say("belay", "stopping")
    finally:
        tree.stop()
        if postgres is not None:
            postgres.clean_up()
        if lock is not None:
            lock.close()
    if tree.failure is not None:
        raise StartFailed(tree.failure)
    say("belay", "stopped")


def _for_debugger(options: DevOptions) -> DevOptions:
    """Return the options with one child, to which the debugger attaches, if there is to be one.

    Raises PortBusy, DebuggerMissing.
    """
    if options.debug_port is None:
        return options
    _refuse_busy_port("127.0.0.1", options.debug_port, "--debug-port")
    if find_spec("debugpy") is None:
        raise DebuggerMissing("--debug-port needs debugpy: pip install debugpy")
    return replace(options, concurrency=1)


def _environment(options: DevOptions, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of all processes. Raises SettingsError."""
    env = dict(environ)
    if options.config is not None:
        env["BELAY_CONFIG"] = str(options.config)
    env["BELAY_CONFIG"] = str(config_path(env))
    env = {**with_own_names(env), "PYTHONUNBUFFERED": "1"}
    if options.debug_port is not None:
        env["BELAY_DEBUG_PORT"] = str(options.debug_port)
    if options.concurrency is not None:
        env["BELAY_CONCURRENCY"] = str(options.concurrency)
    of_project = dict(env)
    add_project_env(of_project)
    for name, value in _DEFAULTS.items():
        if name not in with_own_names(of_project):
            env[name] = value
    env["BELAY_BIND"] = f"{options.host}:{options.port}"
    return env


def _refuse_busy_port(host: str, port: int, option: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise PortBusy(
                f"cannot listen on {host}:{port}: {error.strerror}; choose another with {option}"
            ) from error


def _lock_folder(data_dir: Path) -> IO[str]:
    """Return a lock on the data folder, held until it is closed. Raises FolderBusy.

    A second Postgres would refuse to start there; a second Valkey would overwrite the first one's
    data.
    """
    if not data_dir.exists():
        data_dir.mkdir(parents=True)
        data_dir.chmod(0o711)  # Postgres, which root starts as `nobody`, passes through it
    (data_dir / ".gitignore").write_text("*\n")
    lock = (data_dir / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise FolderBusy(
            f"another `belay dev` uses {data_dir}; stop it, or choose another with --data-dir"
        ) from None
    return lock


def _queues(config: Path) -> list[str]:
    """Return the queues of the project's graphs. This does not import LangGraph."""
    try:
        named = orjson.loads(config.read_bytes()).get("queues", {})
        return list(dict.fromkeys([DEFAULT_QUEUE, *named.values()]))
    except (OSError, orjson.JSONDecodeError, AttributeError, TypeError):
        return [DEFAULT_QUEUE]  # the worker reads the file again and reports the error


def _graph_ids(config: Path) -> list[str]:
    try:
        return [str(name) for name in orjson.loads(config.read_bytes())["graphs"]]
    except (OSError, orjson.JSONDecodeError, KeyError, TypeError):
        return []  # the web process and the worker report the error


def _folders(config: Path) -> list[Path]:
    """Return the folders of the project's code. This does not import LangGraph."""
    root = config.resolve().parent
    try:
        entries = orjson.loads(config.read_bytes()).get("dependencies", [])
        named = [root / entry for entry in entries if str(entry).startswith(".")]
    except (OSError, orjson.JSONDecodeError, AttributeError, TypeError):
        named = []
    found = {folder.resolve() for folder in [root, *named]}
    inside = {folder for folder in found if any(parent in found for parent in folder.parents)}
    return sorted(found - inside)


def _mount_prefix(config: Path, environ: Mapping[str, str]) -> str:
    if given := environ.get("MOUNT_PREFIX", "").strip():
        return given.rstrip("/")
    try:
        return str(orjson.loads(config.read_bytes())["http"].get("mount_prefix") or "").rstrip("/")
    except (OSError, orjson.JSONDecodeError, AttributeError, KeyError, TypeError):
        return ""


def _start_valkey(tree: ProcessTree, data_dir: Path) -> str:
    valkey = EmbeddedValkey(data_dir)
    server = valkey.server()
    process = tree.start(
        Program(
            server.name,
            server.command,
            server.environ,
            server.popen,
            stop_seconds=5.0,
            is_server=True,
        )
    )
    wait_until_ready(valkey, process)
    return valkey.url


def _start_postgres(tree: ProcessTree, postgres: EmbeddedPostgres) -> str:
    postgres.initialise()
    server = postgres.server()
    process = tree.start(
        Program(
            server.name,
            server.command,
            server.environ,
            server.popen,
            stop_signal=signal.SIGINT,  # fast shutdown: do not wait for clients to disconnect
            stop_seconds=10.0,
            before=postgres.initialise,
            is_server=True,
        )
    )
    wait_until_ready(postgres, process)
    return postgres.url


def _start_belay(tree: ProcessTree, env: Mapping[str, str], queues: list[str]) -> None:
    """Start migrations, web and worker together. The latter two wait for the schema."""
    migration = Program("migrate", cli_command("migrate"), env)
    migrating = migration.start()
    tree.start(Program("web", web_command(), env, stop_seconds=5.0, loads_project=True))
    worker = worker_command(["-Q", ",".join(queues)])
    tree.start(Program("worker", worker, env, stop_seconds=15.0, loads_project=True))
    if migrating.wait() != 0:
        tree.failure = migration.last_line()
        tree.request_stop()


def _announce_when_ready(tree: ProcessTree, options: DevOptions, config: Path, prefix: str) -> None:
    """Log the project's graphs, and in a thread the URL as soon as the server responds, also after
    each reload."""
    graph_ids = _graph_ids(config)
    if config == EXAMPLE_CONFIG:
        say("belay", "there is no langgraph.json in this folder: serving the example project")
    say("belay", f"serving {config}: {', '.join(graph_ids)}")
    url = f"http://{options.host}:{options.port}"
    example = _curl(url + prefix, graph_ids[0] if graph_ids else "agent")
    ready = [f"ready on {url}{prefix}  (docs: {url}{prefix}/docs)", f"try: {example}"]

    def announce(lines: list[str]) -> None:
        arguments = (tree, f"{url}/ok", lines)
        threading.Thread(target=_announce, args=arguments, daemon=True).start()

    tree.after_reload = lambda: announce([f"ready again on {url}{prefix}"])
    announce(ready)


def _announce(tree: ProcessTree, url: str, lines: list[str]) -> None:
    """Log the lines as soon as the server responds, unless it is loaded again before that."""
    deadline = time.monotonic() + _READY_SECONDS
    reloads = tree.reloads
    while time.monotonic() < deadline and not tree.is_stopping and tree.reloads == reloads:
        try:
            with urllib.request.urlopen(url, timeout=1):  # noqa: S310
                for line in lines:
                    say("belay", line)
                return
        except (OSError, urllib.error.URLError):
            time.sleep(0.05)


def _curl(url: str, graph_id: str) -> str:
    message = '{"messages": [{"role": "user", "content": "hi"}]}'
    body = f'{{"assistant_id": "{graph_id}", "input": {message}}}'
    return f"curl -s {url}/runs/wait -H 'content-type: application/json' -d '{body}'"
