from __future__ import annotations

from importlib.metadata import version

import pytest


def test_ok_reports_health_and_may_check_the_database(http):
    for path in ("/", "/ok", "/ok?check_db=1"):
        assert http.get(path).json() == {"ok": True, "services": {}}


def test_info_reports_versions_and_flags(http):
    info = http.get("/info").json()
    assert info["flags"]["assistants"] is True
    assert info["host"]["kind"] == "self-hosted"
    assert info["version"] == "0.16.7"
    assert info["belay_version"] == version("belay-server")
    assert info["langgraph_py_version"].startswith("1.")
    assert info["flags"]["crons"] is True
    assert info["flags"]["strict_resume"] is True


def test_the_schema_of_langgraph_json_is_served(http):
    answer = http.get("/langgraph.schema.json")
    assert answer.headers["content-type"] == "application/schema+json"
    assert answer.json()["required"] == ["graphs"]


def test_the_openapi_document_is_3_1_and_names_every_route(http):
    document = http.get("/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    routes = {(method, path) for path, item in document["paths"].items() for method in item}
    for route in [
        ("post", "/threads/{thread_id}/runs/{run_id}/cancel"),
        ("delete", "/threads/{thread_id}/runs/{run_id}"),
        ("post", "/runs/cancel"),
        ("get", "/threads/{thread_id}/runs"),
        ("post", "/runs/wait"),
        ("get", "/threads/{thread_id}/state"),
    ]:
        assert route in routes
    body = document["components"]["schemas"]["CancelRuns"]["properties"]
    assert set(body) == {"status", "thread_id", "run_ids"}


def test_every_error_in_the_document_has_the_format_of_its_api(http):
    document = http.get("/openapi.json").json()
    for path, item in document["paths"].items():
        name = "AgentErrorResponse" if path.startswith("/agent/") else "Error"
        for method, operation in item.items():
            if method == "parameters":
                continue
            for status, response in operation["responses"].items():
                if path.endswith("/commands") and status == "400":
                    continue  # the streaming protocol has its own error format
                if status.startswith("4"):
                    schema = response["content"]["application/json"]["schema"]
                    shape = {"$ref": f"#/components/schemas/{name}"}
                    assert schema == shape, (method, path, status)


@pytest.mark.parametrize("path", ["/docs", "/docs/"])
def test_the_api_documentation_needs_no_network(http, path):
    page = http.get(path, follow_redirects=True)
    assert page.status_code == 200
    assert "swagger" in page.text.lower()
    assert "https://" not in page.text.replace("https://petstore", "")
    assert http.get("/docs/swagger-ui-bundle.js").status_code == 200


def test_metrics_are_in_prometheus_format_or_in_json(http):
    text = http.get("/metrics")
    assert text.headers["content-type"].startswith("text/plain")
    for name in ("python_info", "process_cpu_seconds_total", "belay_runs", "belay_http_requests"):
        assert name in text.text
    assert "lg_api_" not in text.text
    assert http.get("/metrics?format=text").text.startswith("# HELP")
    summary = http.get("/metrics?format=json").json()
    assert set(summary) == {"queue", "api", "workers"}
    assert set(summary["queue"]) == {
        "n_pending",
        "n_running",
        "pending_runs_wait_time_max_secs",
        "pending_runs_wait_time_med_secs",
        "pending_unblocked_runs_wait_time_max_secs",
    }


PREFLIGHT = {"origin": "https://a.example", "access-control-request-method": "POST"}


@pytest.mark.parametrize("path", ["/threads", "/runs/cancel", "/nothing/here"])
def test_every_origin_is_allowed_by_default(http, path):
    headers = {**PREFLIGHT, "access-control-request-headers": "content-type, x-api-key"}
    answer = http.options(path, headers=headers)
    assert (answer.status_code, answer.text) == (200, "OK")
    assert answer.headers["access-control-allow-origin"] == "*"
    allowed = answer.headers["access-control-allow-headers"]
    assert {"content-type", "x-api-key"} == {name.strip() for name in allowed.split(",")}
    methods = answer.headers["access-control-allow-methods"].split(", ")
    assert {"DELETE", "GET", "PATCH", "POST", "PUT"} <= set(methods)
    assert answer.headers["access-control-max-age"] == "600"


def test_responses_and_errors_expose_their_headers_to_any_origin(http):
    for path in ("/ok", "/threads/x", "/nothing/here"):
        answer = http.get(path, headers={"origin": "https://a.example"})
        assert answer.headers["access-control-allow-origin"] == "*"
        assert "access-control-allow-credentials" not in answer.headers
        exposed = answer.headers["access-control-expose-headers"].split(", ")
        assert set(exposed) == {
            "x-pagination-total",
            "x-pagination-next",
            "content-location",
            "location",
            "x-request-id",
        }
    assert "access-control-allow-origin" not in http.get("/ok").headers
    body = {"assistant_id": "counter", "input": {"count": 1}}
    headers = {"origin": "https://a.example"}
    with http.stream("POST", "/runs/stream", json=body, headers=headers) as stream:
        assert stream.headers["access-control-allow-origin"] == "*"
