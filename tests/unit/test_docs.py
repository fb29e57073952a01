"""Test that the documentation builds, has no dead links, and matches the code."""

from __future__ import annotations

import ast
import contextvars
import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import click
import pytest
from markdown.extensions.toc import slugify

from belay_server.cli import commands as cli
from belay_server.configuration.setting_aliases import ALIASES, IGNORED, OF_THE_PROJECT, REFUSED
from belay_server.configuration.settings import Settings
from belay_server.db.queues import QueueState
from belay_server.graphs.project.http_section import NOUNS
from belay_server.graphs.project.keys import schema_text
from belay_server.services import queue_metrics
from belay_server.web_metrics import WebMetrics
from belay_workers.background.metrics import _RunCollector
from belay_workers.slots import SlotTable
from tests.bare_api import bare_client
from tests.long_forms import long_case

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PACKAGE = ROOT / "app" / "belay_server"
#: Pages that are not a part of the site.
OUTSIDE = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "deploy/README.md")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def page(name: str) -> str:
    return (DOCS / name).read_text()


def rows(text: str) -> list[list[str]]:
    """Return the cells of all table rows whose first cell is code."""
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


# --- the site -------------------------------------------------------------------------------------


def build(config: Path, site: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(config), "-d", str(site)],
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.fixture
def copied(tmp_path):
    """Return a copy of the sources for tests that break it."""
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    shutil.copytree(DOCS, tmp_path / "docs")
    return tmp_path


def test_the_site_builds_strictly(tmp_path):
    built = build(ROOT / "mkdocs.yml", tmp_path / "site")
    assert built.returncode == 0, built.stderr
    assert 'class="mermaid"' in (tmp_path / "site/explanation/architecture.html").read_text()
    assert "fonts.googleapis" not in (tmp_path / "site/index.html").read_text()


@pytest.mark.parametrize(
    ("path", "text", "words"),
    [
        long_case("index.md", "\n[dead](nowhere.md)\n", "nowhere.md"),
        long_case("index.md", "\n[dead](reference/settings.md#nothing)\n", "#nothing"),
        long_case("orphan.md", "# Orphan\n", "not included in the"),
    ],
    ids=["dead link", "dead anchor", "orphan page"],
)
def test_the_build_fails_for_dead_links_and_orphan_pages(copied, path, text, words):
    with (copied / "docs" / path).open("a") as broken:
        broken.write(text)
    built = build(copied / "mkdocs.yml", copied / "site")
    assert built.returncode != 0
    assert words in built.stderr


def headings(text: str) -> set[str]:
    found = re.findall(r"^#+ (.+)$", _FENCE.sub("", text), re.MULTILINE)
    return {slugify(heading.replace("`", ""), "-") for heading in found}


@pytest.mark.parametrize("name", OUTSIDE)
def test_links_in_pages_outside_the_site_are_valid(name):
    source = ROOT / name
    for link in _LINK.findall(_FENCE.sub("", source.read_text())):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (source.parent / path).resolve()
        assert target.is_file(), f"{name}: {link}"
        assert not anchor or anchor in headings(target.read_text()), f"{name}: {link}"


def test_the_readme_is_short_and_links_to_every_page():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 250
    for path in sorted(DOCS.rglob("*.md")):
        name = path.relative_to(ROOT).as_posix()
        if name == "docs/index.md" or (path.parent.name == "decisions" and path.name[0] == "0"):
            continue
        assert f"({name}" in "\n".join(lines), f"the README has no link to {name}"


def test_the_tests_and_files_that_a_page_names_exist():
    tests = {path.relative_to(ROOT / "tests").as_posix() for path in (ROOT / "tests").rglob("*.py")}
    source = "".join((ROOT / "tests" / name).read_text() for name in sorted(tests))
    defined = set(re.findall(r"def (test_\w+)", source))
    for page_path in [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]:
        text = page_path.read_text()
        for named in re.findall(r"::(test_\w+)", text):
            assert named in defined, f"{page_path.name}: {named}"
        for named in re.findall(r"`(?:tests/)?((?:\w+/)*test_\w+\.py)", text):
            assert any(f"/{name}".endswith(f"/{named}") for name in tests), named
        for named in re.findall(r"`((?:app|workers|tests|deploy)/[\w./]*\w)", text):
            assert (ROOT / named).exists() or page_path.name == "your-own-project.md", named


# --- settings -------------------------------------------------------------------------------------

_OTHERS = "## Variables for graphs"
_ALIASES = "## Names of LangGraph's server"
_GUNICORN = "## The web server's own variables"


def shown(value: Any) -> str:
    """Return a default value as the tables show it."""
    if isinstance(value, bool):
        return "1" if value else "0"
    if value is None or value == ():
        return "–"
    if isinstance(value, tuple):
        return ",".join(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def default_of(cell: str) -> str:
    """Return a cell's value without its note in parentheses; `64 MiB` as a number of bytes."""
    plain = cell.partition(" (")[0].replace("`", "")
    size = re.fullmatch(r"(\d+) (KiB|MiB)", plain)
    if size is None:
        return plain
    return str(int(size[1]) * {"KiB": 1024, "MiB": 1024**2}[size[2]])


def documented(text: str) -> dict[str, str]:
    return {row[0].strip("`"): default_of(row[1]) for row in rows(text)}


def settings_of_the_code() -> dict[str, str]:
    """Return variables and defaults. `from_environ` reads each by `read.<kind>(NAME, …)`."""
    tree = ast.parse((PACKAGE / "configuration" / "settings.py").read_text())
    [function] = [n for n in ast.walk(tree) if getattr(n, "name", "") == "from_environ"]
    read = Settings.from_environ({"DATABASE_URL": "postgresql://x/", "REDIS_URL": "redis://x/"})
    found = {"BELAY_CONFIG": "./langgraph.json, else the example project"}
    for call in (n for n in ast.walk(function) if isinstance(n, ast.Call)):
        if isinstance(call.func, ast.Name) and call.func.id == "cls":
            for field in call.keywords:
                for name in map(name_read, ast.walk(field.value)):
                    if name is not None:
                        found[name] = shown(getattr(read, cast(str, field.arg)))
        elif (name := name_read(call)) is not None:
            found.setdefault(name, "required")
    found |= {"REDIS_URL": "required", "DATABASE_URL": "required", "BROKER_URL": "REDIS_URL"}
    found["BELAY_REDIS_VERIFY_TLS"] = shown(read.redis_verify_tls)
    return found


def name_read(node: ast.AST) -> str | None:
    """Return the variable of a call `read.<kind>(NAME, …)`."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return None
    is_reader = isinstance(node.func.value, ast.Name) and node.func.value.id == "read"
    return str(cast(ast.Constant, node.args[0]).value) if is_reader else None


def test_the_documented_settings_match_the_code():
    text = page("reference/settings.md").partition(_GUNICORN)[0]
    assert documented(text) == settings_of_the_code()


def test_every_setting_is_documented_once_with_unit_and_meaning():
    table = rows(page("reference/settings.md").partition(_ALIASES)[0])
    assert all(len(row) == 4 and all(row) for row in table)
    names = [row[0] for row in table]
    assert len(names) == len(set(names))


def test_the_documented_aliases_match_the_code():
    text = page("reference/settings.md").partition(_ALIASES)[2]
    found: dict[str, list[str]] = {}
    for alias, name in ALIASES.items():
        found.setdefault(f"`{name}`", []).append(f"`{alias}`")
    assert rows(text) == [[name, ", ".join(aliases)] for name, aliases in found.items()]
    assert all(f"`{name}`" in text for name in (*IGNORED, *OF_THE_PROJECT, *REFUSED))


def test_the_documented_web_server_variables_match_its_configuration():
    tree = ast.parse((PACKAGE / "gunicorn_conf.py").read_text())
    found: dict[str, str] = {}
    for call in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
        if ast.unparse(call.func) == "os.environ.get":
            name, *default = [cast(ast.Constant, argument).value for argument in call.args]
            found[str(name)] = shown(default[0] if default else None)
    text = page("reference/settings.md").partition(_GUNICORN)[2].partition(_OTHERS)[0]
    assert documented(text) == {k: v for k, v in found.items() if k not in settings_of_the_code()}


# --- metrics --------------------------------------------------------------------------------------


def exported() -> dict[str, dict[str, set[str]]]:
    """Return the metrics with their labels, by kind of process."""
    web = WebMetrics()
    web.answered("GET", "/ok", 200, 0.1)
    web.listeners_changed(True, 1)
    web.ended_unstarted(None)

    @contextmanager
    def connection():
        yield None

    database = cast(Any, SimpleNamespace(connection=connection))
    states = [QueueState("runs", 1, 1, 1, 1, 0.0, 0.0, 0.0)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(queue_metrics, "queue_states", lambda _conn: states)
        queues = list(queue_metrics.QueueCollector(database, ["runs"]).collect())
    return {
        "web": labels_of([*web._own.collect(), *queues]),
        "worker": labels_of(_RunCollector(SlotTable(4)).collect()),
    }


def labels_of(families: Any) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for family in families:
        if not family.name.startswith("belay_"):
            continue
        name = f"{family.name}_total" if family.type == "counter" else family.name
        found[name] = {label for s in family.samples for label in s.labels} - {"le"}
    return found


def test_the_documented_metrics_match_the_code():
    web, _, worker = page("reference/metrics.md").partition("## Of a worker")
    for kind, text in (("web", web), ("worker", worker.partition("## How they are")[0])):
        named = [re.fullmatch(r"`(\w+)(?:\{(.*)\})?`", row[0]) for row in rows(text)]
        table = {
            found[1]: set(filter(None, (found[2] or "").split(","))) for found in named if found
        }
        assert table == exported()[kind]


# --- routes, commands, langgraph.json -------------------------------------------------------------


def test_the_documented_routes_match_the_openapi_document():
    # In a separate context: the request's fields would stay in the logs of the following tests.
    answer = contextvars.copy_context().run(bare_client().get, "/openapi.json")
    document = answer.get_json()
    routes = {
        f"{method.upper()} {path}"
        for path, item in document["paths"].items()
        for method in item
        if method != "parameters"
    }
    table = [row[0].strip("`") for row in rows(page("reference/api.md"))]
    named = [name for name in table if re.match(r"[A-Z]+ /", name)]
    assert len(named) == len(set(named))
    # The WebSocket, which the document cannot describe.
    assert set(named) == routes | {"GET /threads/{thread_id}/stream/events"}


def commands(group: click.Group, path: str) -> dict[str, click.Command]:
    found: dict[str, click.Command] = {}
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            found |= commands(command, f"{path} {name}")
        else:
            found[f"{path} {name}"] = command
    return found


def test_every_command_and_option_of_the_cli_is_documented():
    text = page("reference/cli.md")
    for name, command in commands(cli.main, "belay").items():
        assert name in text
        for parameter in command.params:
            for option in parameter.opts:
                assert not option.startswith("--") or option in text, f"{name} {option}"


def test_the_documented_make_targets_match_the_makefile():
    [phony] = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = set(re.findall(r"`make ([\w-]+)`", page("reference/cli.md")))
    assert named == set(phony.split())


def test_the_log_lines_that_the_runbook_quotes_exist():
    source = "".join(
        file.read_text() for folder in ("app", "workers") for file in (ROOT / folder).rglob("*.py")
    )
    quoted = re.findall(r'log(?: says|:) "([^"]+)"', page("operations/runbook.md"))
    assert len(quoted) > 2
    assert [words for words in quoted if words not in source] == []


def test_the_schema_of_langgraph_json_is_in_the_site():
    assert (DOCS / "reference/langgraph.schema.json").read_bytes() == schema_text()


def test_every_switch_of_the_http_section_is_documented():
    named = set(re.findall(r"`disable_(\w+)`", page("reference/langgraph-json.md")))
    assert named == set(NOUNS)


def test_every_decision_has_its_three_parts_and_an_index_entry():
    index = page("decisions/index.md")
    records = sorted((DOCS / "decisions").glob("0*.md"))
    assert [int(path.name[:4]) for path in records] == list(range(1, len(records) + 1))
    for path in records:
        text = path.read_text()
        for part in ("Context", "Decision", "Consequence"):
            assert f"\n## {part}\n" in text, path.name
        assert 10 <= len(text.splitlines()) <= 25
        assert f"({path.name})" in index
