"""Test that every key of LangGraph's CLI is honoured, or refused with its name and the reason."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema_rs
import orjson
import pytest

from belay_server.graphs.project.http_section import NOUNS
from belay_server.graphs.project.keys import schema_text
from belay_server.graphs.project.langgraph_json import Project, read_project
from belay_server.graphs.project.loading import ProjectError
from tests.servers import PROJECT

GRAPHS = {"a": "./a.py:g"}


def read(tmp_path, **document: Any) -> Project:
    path = tmp_path / "langgraph.json"
    path.write_text(json.dumps({"graphs": GRAPHS, **document}))
    return read_project(path)


def warnings(tmp_path, **document: Any) -> list[str]:
    prefix = f"{tmp_path / 'langgraph.json'}: "
    return [text.removeprefix(prefix) for text in read(tmp_path, **document).warnings]


@pytest.mark.parametrize("path", sorted(PROJECT.parent.glob("*.json")), ids=lambda path: path.name)
def test_the_schema_accepts_the_projects_of_the_tests(path):
    jsonschema_rs.validate(orjson.loads(schema_text()), orjson.loads(path.read_bytes()))
    assert read_project(path).warnings == ()


def test_the_schema_is_valid_and_has_every_disable_option():
    schema = orjson.loads(schema_text())
    jsonschema_rs.meta.validate(schema)
    http = schema["properties"]["http"]["properties"]
    assert {f"disable_{noun}" for noun in NOUNS} <= http.keys()


@pytest.mark.parametrize(
    ("document", "warning"),
    [
        (
            {"dependancies": []},
            "unknown key 'dependancies' is ignored; did you mean 'dependencies'?",
        ),
        ({"zzz": 1}, "unknown key 'zzz' is ignored"),
        (
            {"http": {"disable_run": True}},
            "'http.disable_run' is ignored; did you mean 'disable_runs'",
        ),
        ({"store": {"ttl": {"default": 5}}}, "'store.ttl.default' is ignored"),
        ({"graphs": {"a": {"path": "./a.py:g", "name": "x"}}}, "'graphs.a.name' is ignored"),
        ({"graphs": {**GRAPHS, "js": "./b.ts:g"}}, "graph 'js' is JavaScript and is not served"),
        ({"graphs": {**GRAPHS, "js": {"path": "./b.mjs:g"}}}, "graph 'js' is JavaScript"),
        ({"ui": {"agent": "./ui.tsx"}}, "user interface components of 'ui' are not served"),
        (
            {"store": {"path": "./s.py:s", "ttl": {"default_ttl": 1}}},
            "'store.ttl' has no effect beside 'store.path'",
        ),
    ],
)
def test_a_key_without_effect_is_named_at_the_start(tmp_path, document, warning):
    (found,) = warnings(tmp_path, **document)
    assert warning in found


@pytest.mark.parametrize(
    "document",
    [
        {"$schema": "https://x", "python_version": "3.12", "dockerfile_lines": ["RUN x"]},
        {"source": {"kind": "uv", "root": "."}, "keep_pkg_tools": True, "api_version": "0.3"},
        {"auth": {"path": "./a.py:auth", "disable_studio_auth": True}},
        {"checkpointer": {"ttl": {"sweep_limit": 5, "sweep_interval_minutes": 1}}},
        {"env": {"ANYTHING": "x"}, "queues": {"a": "q"}, "encryption": None},
    ],
)
def test_keys_that_need_nothing_are_accepted_silently(tmp_path, document):
    assert warnings(tmp_path, **document) == []


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"encryption": {"path": "./e.py:e"}}, "'encryption' is not supported: Belay would store"),
        ({"priority": {"path": "./p.py:p"}}, "'priority' is not supported"),
        ({"http": {"mount_prefix": "x"}}, "'http.mount_prefix' must be a path such as"),
        ({"http": {"mount_prefix": "/a/../b c"}}, "'http.mount_prefix' must be a path such as"),
        ({"checkpointer": {"serde": {"pickle_fallback": True}}}, "never unpickles"),
        ({"checkpointer": {"serde": 5}}, "'checkpointer.serde' must be an object"),
        (
            {"checkpointer": {"serde": {"allowed_msgpack_modules": True}}},
            "LANGGRAPH_STRICT_MSGPACK=false",
        ),
        ({"checkpointer": {"serde": {"allowed_msgpack_modules": ["x"]}}}, "must be a list of"),
        ({"graphs": {"js": "./b.ts:g"}}, "at least one graph in Python"),
        ({"auth": {"path": "./a.py:auth", "openapi": {"security": {}}}}, "'auth.openapi'"),
        ({"auth": {"path": "./a.py:auth", "cache": {"ttl_seconds": 5}}}, "'auth.cache.cache_keys'"),
        (
            {"auth": {"path": "./a.py:auth", "cache": {"cache_keys": ["a"], "ttl_seconds": 0}}},
            "'auth.cache.ttl_seconds' must be a number above 0",
        ),
        ({"store": {"path": "./s.py"}}, "'store.path' must be"),
        ({"checkpointer": {"path": "./c.py"}}, "'checkpointer.path' must be"),
        ({"webhooks": {"headers": {"x\ny": "a"}}}, "is no valid HTTP header"),
        ({"webhooks": {"headers": {"x": "a\r\nb: c"}}}, "'webhooks.headers.x' is no valid"),
        ({"http": {"middleware_order": "last"}}, "'http.middleware_order' must be"),
        ({"http": {"logging_headers": 5}}, "'http.logging_headers' must be an object"),
    ],
)
def test_a_key_that_cannot_be_honoured_stops_the_start(tmp_path, document, message):
    with pytest.raises(ProjectError, match=re.escape(message)):
        read(tmp_path, **document)


def test_types_of_states_may_be_allowed(tmp_path):
    serde = {"allowed_msgpack_modules": [["my.models", "Order"]], "pickle_fallback": False}
    project = read(tmp_path, checkpointer={"serde": serde})
    assert project.allowed_types == {("my.models", "Order")}


def test_variables_of_langgraphs_server_have_precedence(tmp_path, monkeypatch):
    document = {
        "checkpointer": {"ttl": {"default_ttl": 5}},
        "http": {"cors": {"allow_origins": ["https://a"]}, "mount_prefix": "/a"},
    }
    project = read(tmp_path, **document)
    assert (project.thread_ttl.minutes, project.http.mount_prefix) == (5.0, "/a")
    monkeypatch.setenv("LANGGRAPH_THREAD_TTL", '{"strategy": "keep_latest", "default_ttl": 9}')
    monkeypatch.setenv("CORS_CONFIG", '{"allow_origins": ["https://b"], "max_age": 5}')
    monkeypatch.setenv("MOUNT_PREFIX", "/b/")
    for given in (document, {}):
        project = read(tmp_path, **given)
        assert (project.thread_ttl.minutes, project.thread_ttl.strategy) == (9.0, "keep_latest")
        assert (project.http.cors.allow_origins, project.http.cors.max_age) == (("https://b",), 5)
        assert project.http.mount_prefix == "/b"
        assert project.url_in("http://web:1/") == "http://web:1/b"


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("CORS_CONFIG", '{"max_age": -5}', "cors.max_age"),
        ("MOUNT_PREFIX", "b", "mount_prefix"),
    ],
)
def test_a_variable_of_the_wrong_type_is_named(tmp_path, monkeypatch, name, value, what):
    monkeypatch.setenv(name, value)
    with pytest.raises(ProjectError, match=f"^{name}: 'http.{what}"):
        read(tmp_path, http={"mount_prefix": "/a"})


@pytest.mark.parametrize("name", ["LANGGRAPH_THREAD_TTL", "CORS_CONFIG", "LANGGRAPH_CONFIG"])
@pytest.mark.parametrize("value", ["{", "[]"])
def test_an_invalid_variable_is_named(tmp_path, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(ProjectError, match=name):
        read(tmp_path)
