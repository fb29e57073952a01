from __future__ import annotations

import json
import sys

import pytest

from belay_server.api.project.app import ProjectApp
from belay_server.graphs.project.langgraph_json import read_project
from belay_server.graphs.project.loading import ProjectError, name_of_file
from tests.servers import PROJECT

GRAPHS = {"counter": "./graphs/simple.py:counter"}


def project(tmp_path, http, **files):
    for name, text in files.items():
        (tmp_path / f"{name}.py").write_text(text)
    path = tmp_path / "langgraph.json"
    path.write_text(json.dumps({"graphs": GRAPHS, "http": http}))
    return read_project(path)


@pytest.mark.parametrize(
    ("http", "message"),
    [
        ([], "'http' must be an object"),
        ({"app": 5}, "'http.app'"),
        ({"app": "./app.py"}, "'http.app'"),
        ({"disable_runs": "yes"}, "'http.disable_runs'"),
        ({"cors": "*"}, "'http.cors'"),
        ({"cors": {"allow_origins": "*"}}, "'http.cors.allow_origins'"),
        ({"cors": {"allow_credentials": 1}}, "'http.cors.allow_credentials'"),
        ({"cors": {"max_age": "1"}}, "'http.cors.max_age'"),
        ({"cors": {"allow_headers": ["x-a\nb"]}}, "'http.cors.allow_headers'"),
        ({"cors": {"allow_methods": ["FOO BAR"]}}, "'http.cors.allow_methods'"),
        ({"cors": {"allow_origin_regex": "("}}, "'http.cors.allow_origin_regex'"),
        ({"configurable_headers": 5}, "'http.configurable_headers'"),
    ],
)
def test_an_invalid_http_section_is_refused_with_its_key(tmp_path, http, message):
    with pytest.raises(ProjectError, match=message):
        project(tmp_path, http)


def test_without_an_http_section_the_defaults_apply():
    http = read_project(PROJECT).http
    assert http.app is None
    assert http.serves("runs")
    assert http.cors.allow_origins is None


STARTS = """
async def fails(scope, receive, send):
    await receive()
    await send({"type": "lifespan.startup.failed", "message": "no database"})
"""


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "there is no file"),
        ("other = 1", "has no 'fails'"),
        ("fails = []", "must be a WSGI or ASGI app, not a list"),
        ("raise RuntimeError('no key')", "RuntimeError: no key"),
        (STARTS, "no database"),
    ],
)
def test_an_app_that_cannot_be_served_is_refused_with_the_reason(tmp_path, source, message):
    files = {} if source is None else {"own_app": source}
    read = project(tmp_path, {"app": "./own_app.py:fails"}, **files)
    for name in ("own_app", name_of_file(tmp_path / "own_app.py")):
        sys.modules.pop(name, None)
    with pytest.raises(ProjectError, match=message):
        ProjectApp.load(read)


def test_a_project_without_an_app_has_none():
    assert ProjectApp.load(read_project(PROJECT)) is None
