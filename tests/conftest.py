"""Fixtures that the suites share.

`unit` needs no server, `integration` Postgres or Valkey, `acceptance` and `faults` a live server.
"""

from __future__ import annotations

import tempfile
from functools import cache, partial
from pathlib import Path
from typing import Any

import psycopg
import pytest
from httpx._transports import default as transports
from psycopg.sql import SQL, Identifier

from belay_server.db.migrate import migrate
from belay_server.dev.embedded import EmbeddedPostgres, EmbeddedValkey
from tests.groups import ByServers, group_of, order_of
from tests.servers import PROJECT, STORE_INDEX, LiveServer, running


def pytest_addoption(parser):
    parser.addoption(
        "--long", action="store_true", help="run the tests marked long, and only those"
    )
    parser.addoption(
        "--full", action="store_true", help="run the tests marked full, and only those"
    )


def pytest_ignore_collect(collection_path, config):
    """Ignore a file whose tests are all long, unless long ones are selected: its import takes as
    much time as many tests, in each process of the quick suite."""
    is_quick = not (config.option.long or config.option.full)
    return True if is_quick and collection_path.name == "test_schemathesis.py" else None


def pytest_collection_modifyitems(config, items):
    """Select one of the three parts of the suite: each test belongs to one of them."""
    wanted = "full" if config.option.full else "long" if config.option.long else "quick"
    selected = [item for item in items if _part_of(item) == wanted]
    chosen = set(map(id, selected))
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in chosen])
    if wanted == "quick":
        selected.sort(key=lambda item: order_of(item.nodeid.partition("::")[0]))
    items[:] = selected


def pytest_xdist_make_scheduler(config, log):
    """Distribute the quick suite by the servers that files share, everything else as configured."""
    if config.option.long or config.option.full:
        return None
    config.option.loadscopereorder = False  # `pytest_collection_modifyitems` has ordered them
    return ByServers(config, log)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """Stop the servers of a group of the quick suite after its last test: their workers and web
    processes would take time from the other groups until the process ends."""
    quick = not (item.config.option.long or item.config.option.full)
    if quick and nextitem is not None and _group(item) != _group(nextitem):
        for live in item.config.stash.get(_MADE, []):
            if live.process is not None:
                live.stop()


#: The servers that `make_server` has made in this process.
_MADE = pytest.StashKey[list[LiveServer]]()


def _group(item):
    return group_of(item.nodeid.partition("::")[0])


def _part_of(item):
    return next((part for part in ("full", "long") if item.get_closest_marker(part)), "quick")


@pytest.fixture(scope="session", autouse=True)
def shared_ssl_context():
    """Let all HTTP clients share an SSL context. Each would load the certificates again, which
    takes 28 ms of CPU time; no test uses them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transports, "create_ssl_context", cache(transports.create_ssl_context))
        yield


@pytest.fixture(scope="session")
def scratch():
    """A folder with a short path, for sockets, that the embedded Postgres's user can reach."""
    with tempfile.TemporaryDirectory(prefix="belay-test-", dir="/tmp") as folder:
        path = Path(folder)
        path.chmod(0o755)
        yield path


@pytest.fixture(scope="session")
def make_database(scratch):
    """A function that creates a migrated database with the given name and returns its URL. All are
    in one Postgres, which takes less time than one Postgres for each server."""
    with running(EmbeddedPostgres(scratch / "pg", durable=False, connections=400)) as url:

        def create(name: str, *, template: str) -> str:
            with psycopg.connect(url, autocommit=True) as conn:
                statement = SQL("CREATE DATABASE {} TEMPLATE {}")
                conn.execute(statement.format(Identifier(name), Identifier(template)))
            return url.replace("/postgres?", f"/{name}?")

        template = create("template_belay", template="template1")
        for index in (None, STORE_INDEX):  # for projects whose store has an index, and others
            migrate(template, store_index=index)
        yield partial(create, template="template_belay")


@pytest.fixture(scope="session")
def database_url(make_database):
    """The URL of a migrated database for the tests."""
    return make_database("tests")


@pytest.fixture(scope="session")
def make_server(scratch, make_database, request):
    """A function that makes a live server with its own data and the given settings. Its worker
    has half as many child processes as that of the common server."""

    made = request.config.stash.setdefault(_MADE, [])

    def make(name: str, **options: Any) -> LiveServer:
        options = {"concurrency": 4, "DATABASE_URL": make_database(name), **options}
        made.append(LiveServer(scratch / name, **options))
        return made[-1]

    return make


@pytest.fixture(scope="session")
def guarded(make_server):
    """A server with the project's own authentication, for the tests of several files."""
    live = make_server(
        "with-auth",
        config=PROJECT.parent / "with_auth.json",
        BELAY_HEARTBEAT_SECONDS="1",
        BELAY_WEBHOOK_ALLOW_PRIVATE="1",
        BELAY_STATEMENT_SECONDS="20",
    ).start()
    yield live
    live.stop()


@pytest.fixture(scope="session")
def keyed(make_server):
    """A server that requires API keys, with one child process, small limits, and no beta header."""
    live = make_server(
        "keys",
        concurrency=1,
        BELAY_AUTH="keys",
        BELAY_HEARTBEAT_SECONDS="60",
        BELAY_BODY_SECONDS="30",
        BELAY_MAX_OPEN_REQUESTS="10",
        BELAY_REDACT_ERRORS="1",
        BELAY_EXA_BETA_REQUIRED="0",
        BELAY_AGENT_RUNS_PER_TEAM="3",
    ).start()
    yield live
    live.stop()


@pytest.fixture(scope="session")
def valkey_url(scratch):
    with running(EmbeddedValkey(scratch / "bus")) as url:
        yield url


@pytest.fixture
def beats(tmp_path):
    return Beats(tmp_path / "beats")


class Beats:
    """Reads the lines that nodes have written to a file, and waits for them."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def lines(self) -> list[str]:
        return self.path.read_text().splitlines() if self.path.exists() else []

    def names(self) -> list[str]:
        return [line.split()[0] for line in self.lines()]

    def pids(self) -> set[int]:
        return {int(line.split()[1]) for line in self.lines()}

    def wait_for(self, name: str, count: int = 1, seconds: float = 30.0) -> None:
        from tests.waiting import wait_until

        wait_until(lambda: self.names().count(name) >= count, seconds, f"{count} x {name}")
