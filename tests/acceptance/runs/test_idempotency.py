"""A create can be retried with the same `run_id` or the same Idempotency-Key."""

from __future__ import annotations

import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

BODY = {"assistant_id": "counter", "input": {"count": 1}}


@pytest.fixture
def key() -> dict[str, str]:
    return {"Idempotency-Key": f"order {uuid.uuid4()}"}


@pytest.fixture
def thread_id(http) -> str:
    return http.post("/threads", json={}).json()["thread_id"]


def test_the_same_key_returns_the_same_run(http, thread_id, key):
    path = f"/threads/{thread_id}/runs"
    first = http.post(path, json=BODY, headers=key).json()
    again = http.post(path, json=BODY, headers=key)
    assert again.status_code == 200
    assert again.json()["run_id"] == first["run_id"]
    waited = http.post(f"{path}/wait", json=BODY, headers=key)
    assert waited.json() == {"count": 2}
    assert waited.headers["content-location"].endswith(first["run_id"])
    assert len(http.get(path).json()) == 1


def test_concurrent_creates_with_one_key_create_one_run(http, thread_id, key):
    path = f"/threads/{thread_id}/runs"
    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda _: http.post(path, json=BODY, headers=key), range(20)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["run_id"] for answer in answers}) == 1


def test_the_same_key_on_two_threads_creates_two_runs(http, key):
    threads = [http.post("/threads", json={}).json()["thread_id"] for _ in range(2)]
    runs = [
        http.post(f"/threads/{thread_id}/runs", json=BODY, headers=key).json()
        for thread_id in threads
    ]
    assert runs[0]["run_id"] != runs[1]["run_id"]
    assert [run["thread_id"] for run in runs] == threads


def test_the_same_key_returns_the_same_stateless_run(http, key):
    answers = [http.post("/runs/wait", json=BODY, headers=key) for _ in range(2)]
    assert [answer.json() for answer in answers] == [{"count": 2}] * 2
    assert len({answer.headers["content-location"] for answer in answers}) == 1


def test_a_different_or_missing_key_creates_a_new_run(http, thread_id, key):
    path = f"/threads/{thread_id}/runs"
    headers = [key, {"Idempotency-Key": "another"}, {}, {}, {"Idempotency-Key": ""}]
    runs = {http.post(path, json=BODY, headers=sent).json()["run_id"] for sent in headers}
    assert len(runs) == 5


def test_a_run_id_in_the_body_takes_precedence_over_a_key(http, thread_id, key):
    path = f"/threads/{thread_id}/runs"
    run_id = str(uuid.uuid4())
    assert http.post(path, json={**BODY, "run_id": run_id}, headers=key).json()["run_id"] == run_id


def test_a_key_that_is_too_long_is_refused(http, thread_id):
    answer = http.post(
        f"/threads/{thread_id}/runs", json=BODY, headers={"Idempotency-Key": "k" * 256}
    )
    assert answer.status_code == 422
    assert "Idempotency-Key" in answer.json()["detail"]
    assert http.get(f"/threads/{thread_id}/runs").json() == []


@pytest.mark.parametrize("by", ["run_id", "key", "run_id on a copy"])
def test_the_id_of_a_deleted_run_starts_a_new_run(http, thread_id, key, by):
    """LangGraph takes the same id for a later attempt, and goes on without the new input."""
    more, headers = ({}, key) if by == "key" else ({"run_id": str(uuid.uuid4())}, {})
    path = f"/threads/{thread_id}/runs"
    first = http.post(f"{path}/wait", json={**BODY, **more}, headers=headers)
    assert first.json() == {"count": 2}
    run_id = http.get(path).json()[0]["run_id"]
    copy = http.post(f"/threads/{thread_id}/copy").json()["thread_id"]
    http.delete(f"{path}/{run_id}")
    path = f"/threads/{copy}/runs" if by == "run_id on a copy" else path
    body = {"assistant_id": "counter", "input": {"count": 10}, **more}
    assert http.post(f"{path}/wait", json=body, headers=headers).json() == {"count": 11}
    assert http.get(path).json()[0]["run_id"] == run_id
