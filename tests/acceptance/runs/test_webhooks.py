"""Webhooks are called after every end of a run, signed, retried, and never to private addresses."""

from __future__ import annotations

import base64
import hashlib
import hmac

import httpx
import pytest
from langgraph_sdk import get_sync_client

from tests.acceptance.conftest import WEBHOOK_SECRET
from tests.acceptance.playing import new_thread, until_status
from tests.conformance import watched
from tests.receiver import receiver
from tests.waiting import wait_until

__all__ = ["receiver"]


@pytest.fixture
def client(patient):
    with watched(get_sync_client(url=patient.url)) as made:
        yield made


@pytest.fixture
def rest(patient):
    with watched(httpx.Client(base_url=patient.url, timeout=60)) as made:
        yield made


@pytest.fixture
def hook(receiver):
    return f"{receiver.url}/hook?a=1"


def test_a_webhook_call_has_the_run_and_its_values(client, rest, receiver, hook):
    thread_id = new_thread(rest)
    run = client.runs.create(
        thread_id, "counter", input={"count": 1}, metadata={"m": 1}, webhook=hook
    )
    payload = receiver.wait_for(run["run_id"])
    assert payload["status"] == "success"
    assert payload["values"] == {"count": 2}
    assert (payload["thread_id"], payload["assistant_id"]) == (thread_id, run["assistant_id"])
    assert payload["metadata"]["m"] == 1
    assert payload["kwargs"]["webhook"] == hook
    assert "error" not in payload
    moments = ("created_at", "run_started_at", "run_ended_at", "webhook_sent_at")
    assert [payload[name] for name in moments] == sorted(payload[name] for name in moments)
    assert receiver.calls[0][0] == "/hook?a=1"


def test_the_parameters_of_a_webhooks_path_are_sent(client, receiver):
    """httpcore removes them from a URL that it parses, so the call would go to another path."""
    hook = f"{receiver.url}/hook;a=b/c;d?e"
    run = client.runs.create(None, "counter", input={"count": 1}, webhook=hook)
    receiver.wait_for(run["run_id"])
    assert receiver.calls[0][0] == "/hook;a=b/c;d?e"


def test_a_webhook_call_is_signed(client, receiver, hook):
    run = client.runs.create(None, "counter", input={"count": 1}, webhook=hook)
    receiver.wait_for(run["run_id"])
    _, headers, body = receiver.calls[0]
    assert headers["content-type"] == "application/json"
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    digest = hmac.new(WEBHOOK_SECRET.encode(), signed, hashlib.sha256).digest()
    assert headers["webhook-signature"] == f"v1,{base64.b64encode(digest).decode()}"


def test_the_call_of_a_stateless_run_has_its_values(client, receiver, hook):
    run = client.runs.create(None, "counter", input={"count": 5}, webhook=hook)
    assert receiver.wait_for(run["run_id"])["values"] == {"count": 6}


def test_the_call_of_a_failed_run_has_its_error(client, receiver, hook):
    run = client.runs.create(None, "bad", input={}, webhook=hook)
    payload = receiver.wait_for(run["run_id"])
    assert payload["status"] == "error"
    assert payload["error"] == {"error": "ValueError", "message": "boom from bad node"}


def test_the_call_of_a_timed_out_run_has_its_error(rest, receiver, hook):
    body = {"assistant_id": "steps", "input": {"seconds": 30}, "webhook": hook}
    run = rest.post("/runs", json={**body, "timeout_seconds": 0.3}).json()
    payload = receiver.wait_for(run["run_id"])
    assert (payload["status"], payload["error"]["error"]) == ("timeout", "TimeoutError")


@pytest.mark.parametrize(("action", "status"), [("interrupt", "interrupted"), ("rollback",) * 2])
@pytest.mark.parametrize("started", [True, False], ids=["running", "pending"])
def test_the_call_of_a_cancelled_run_has_its_status(
    client, rest, receiver, hook, beats, action, status, started
):
    thread_id = new_thread(rest)
    body = {"beats": str(beats), "seconds": 60}
    later = None if started else 3600
    run = client.runs.create(thread_id, "steps", input=body, webhook=hook, after_seconds=later)
    if started:
        until_status(rest, thread_id, run["run_id"], "running")
        beats.wait_for("s1:start")
    client.runs.cancel(thread_id, run["run_id"], action=action, wait=True)
    payload = receiver.wait_for(run["run_id"])
    assert payload["status"] == status
    assert payload["run_ended_at"] is not None


def test_every_route_that_creates_a_run_accepts_a_webhook(client, rest, receiver, hook):
    thread_id = new_thread(rest)
    body = {"assistant_id": "counter", "input": {"count": 1}, "webhook": hook}
    for path in (f"/threads/{thread_id}/runs/wait", "/runs/wait", "/runs/stream"):
        assert rest.post(path, json=body).status_code == 200
    batch = rest.post("/runs/batch", json=[body, body]).json()
    cron = client.crons.create("counter", schedule="* * * * * *", webhook=hook)
    for run in batch:
        receiver.wait_for(run["run_id"])
    wait_until(lambda: len(receiver.calls) >= 6, 30, "the cron's call")
    client.crons.delete(cron["cron_id"])


def test_a_failed_webhook_call_is_retried_with_the_same_id(client, receiver, hook):
    receiver.statuses = [500, 302, 404]
    run = client.runs.create(None, "counter", input={"count": 1}, webhook=hook)
    receiver.wait_for(run["run_id"], 4)
    ids = {headers["webhook-id"] for _, headers, _ in receiver.calls}
    assert len(ids) == 1
    # The redirect was not followed.
    assert {path for path, _, _ in receiver.calls} == {"/hook?a=1"}


def test_an_unreachable_receiver_delays_no_run_and_no_other_call(client, receiver, hook):
    silent = "http://127.0.0.1:9/closed"
    for _ in range(10):
        client.runs.create(None, "counter", input={"count": 1}, webhook=silent)
    run = client.runs.create(None, "counter", input={"count": 1}, webhook=hook)
    assert receiver.wait_for(run["run_id"])["values"] == {"count": 2}
