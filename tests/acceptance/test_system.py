from __future__ import annotations

import pytest


def test_ok_says_so_and_may_ask_the_database(http):
    for path in ("/ok", "/ok?check_db=1"):
        assert http.get(path).json() == {"ok": True, "services": {}}


def test_info_names_versions(http):
    info = http.get("/info").json()
    assert info["flags"]["assistants"] is True
    assert info["host"]["kind"] == "self-hosted"
    assert info["langgraph_py_version"].startswith("1.")


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


def test_every_error_in_the_document_has_the_one_shape(http):
    document = http.get("/openapi.json").json()
    for path, item in document["paths"].items():
        for method, operation in item.items():
            if method == "parameters":
                continue
            for status, response in operation["responses"].items():
                if status.startswith("4"):
                    schema = response["content"]["application/json"]["schema"]
                    assert schema == {"$ref": "#/components/schemas/Error"}, (method, path, status)


@pytest.mark.parametrize("path", ["/docs", "/docs/"])
def test_the_documentation_is_a_page_that_needs_no_network(http, path):
    page = http.get(path, follow_redirects=True)
    assert page.status_code == 200
    assert "swagger" in page.text.lower()
    assert "https://" not in page.text.replace("https://petstore", "")
    assert http.get("/docs/swagger-ui-bundle.js").status_code == 200
