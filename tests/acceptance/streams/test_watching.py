"""Metrics, logs and request ids of a server with a worker's metrics port and JSON logs."""

from __future__ import annotations

import json
import re
import threading
import uuid

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests import conformance
from tests.acceptance.conftest import with_worker_metrics
from tests.acceptance.playing import new_thread, run_of, wait_for
from tests.waiting import wait_until


@pytest.fixture(scope="module")
def watched(patient):
    return patient


@pytest.fixture(scope="module")
def impatient(make_server):
    """Yield a server that kills a node which has not stopped after 300 ms."""
    live = make_server("impatient", BELAY_CANCEL_GRACE_MS="300", BELAY_LOG_FORMAT="json")
    yield from with_worker_metrics(live)


@pytest.fixture
def web(watched):
    with conformance.watched(httpx.Client(base_url=watched.url, timeout=60)) as client:
        yield client


@pytest.fixture
def impatient_web(impatient):
    with conformance.watched(httpx.Client(base_url=impatient.url, timeout=60)) as client:
        yield client


def samples(text: str) -> dict[tuple, float]:
    """Return the value of every sample by its name and labels."""
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def scraped(url: str) -> dict[tuple, float]:
    response = httpx.get(url, timeout=30)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/plain")
    return samples(response.text)


class Change:
    """The growth of samples since the test began."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.before = scraped(url)

    def of(self, name: str, **labels: str) -> float:
        key = (name, *sorted(labels.items()))
        return scraped(self.url)[key] - self.before.get(key, 0.0)


def test_ended_runs_are_counted_and_timed_by_status(watched, web):
    change = Change(watched.worker_metrics)
    thread_id = new_thread(web)
    wait_for(web, thread_id, "counter", {"count": 1})
    wait_for(web, thread_id, "bad", {"count": 1})
    wait_until(lambda: change.of("belay_runs_ended_total", status="error") == 1, 20, "the error")
    assert change.of("belay_runs_ended_total", status="success") == 1
    assert change.of("belay_run_duration_seconds_count", status="success") == 1
    assert change.of("belay_claim_latency_seconds_count") == 2
    assert change.of("belay_claim_latency_seconds_sum") > 0
    assert change.of("belay_run_duration_seconds_sum", status="success") > 0


ACTIONS = pytest.mark.parametrize(
    ("action", "status"), [("interrupt", "interrupted"), ("rollback", "rolled_back")]
)


@ACTIONS
def test_the_cancel_of_a_node_that_stops_is_timed_as_asked(watched, web, beats, action, status):
    change = Change(watched.worker_metrics)
    cancelled(web, change, beats, "async_sleep", "asked", action, status)
    assert change.of("belay_child_deaths_total", cause="killed") == 0
    assert change.of("belay_cancel_latency_seconds_sum", how="asked") >= 0


@ACTIONS
def test_the_cancel_of_a_node_that_does_not_stop_is_timed_as_killed(
    impatient, impatient_web, beats, action, status
):
    change = Change(impatient.worker_metrics)
    cancelled(impatient_web, change, beats, "swallow_sync", "killed", action, status)
    assert change.of("belay_child_deaths_total", cause="killed") == 1
    assert change.of("belay_cancel_latency_seconds_sum", how="killed") >= 0.3


def cancelled(web, change, beats, kind, how, action, status) -> None:
    thread_id = new_thread(web)
    run_id = run_of(web, thread_id, "nodes", {"kind": kind, "beats": str(beats)})
    wait_until(
        lambda: web.get(f"/threads/{thread_id}/runs/{run_id}").json()["status"] == "running",
        20,
        "the run to start",
    )
    beats.wait_for("begin" if kind == "async_sleep" else "beat")
    web.post(f"/threads/{thread_id}/runs/{run_id}/cancel", params={"wait": "1", "action": action})
    wait_until(
        lambda: change.of("belay_cancel_latency_seconds_count", how=how) == 1, 20, "the cancel"
    )
    assert change.of("belay_runs_ended_total", status=status) == 1
    assert change.of("belay_run_duration_seconds_count", status=status) == 1


def test_a_cancel_of_a_pending_run_is_counted_by_the_web_process(watched, web):
    change = Change(f"{watched.url}/metrics")
    thread_id = new_thread(web)
    run_id = run_of(web, thread_id, "counter", {"count": 1}, after_seconds=3600)
    web.post(f"/threads/{thread_id}/runs/{run_id}/cancel", params={"wait": "1"})
    assert change.of("belay_cancel_latency_seconds_count", how="pending") == 1
    assert change.of("belay_runs_ended_total", status="interrupted") == 1


def test_pending_and_running_runs_are_counted_by_queue(watched, web):
    def now(name, **labels):
        return scraped(f"{watched.url}/metrics")[(name, *sorted(labels.items()))]

    assert now("belay_database_up") == 1
    for queue in ("runs", "heavy", "parents"):
        assert now("belay_runs", queue=queue, status="pending") == 0
    thread_id = new_thread(web)
    run_of(web, thread_id, "nodes", {"kind": "async_sleep"})
    run_of(web, thread_id, "counter", {"count": 1})
    run_of(web, thread_id, "counter", {"count": 1}, after_seconds=3600)
    wait_until(lambda: now("belay_runs", queue="runs", status="running") == 1, 20, "the run")
    assert now("belay_runs", queue="runs", status="pending") == 2
    assert now("belay_queue_depth", queue="runs", which="due") == 1
    assert now("belay_queue_depth", queue="runs", which="claimable") == 0
    assert now("belay_queue_age_seconds", queue="runs", which="due") > 0
    summary = web.get("/metrics", params={"format": "json"}).json()
    assert set(summary) == {"queue", "api", "workers"}
    assert (summary["queue"]["n_running"], summary["queue"]["n_pending"]) == (1, 2)
    assert summary["queue"]["pending_runs_wait_time_max_secs"] > 0
    assert summary["queue"]["pending_runs_wait_time_med_secs"] > 0
    assert summary["queue"]["pending_unblocked_runs_wait_time_max_secs"] == 0
    assert summary["workers"]["active"] == 1
    assert web.delete(f"/threads/{thread_id}").status_code == 204


def test_the_worker_reports_its_own_metrics(watched):
    found = scraped(watched.worker_metrics)
    assert found["belay_worker_children", ("state", "idle")] >= 1
    assert found["belay_lease_losses_total", ("seen_by", "sweeper")] >= 0
    assert found["belay_lease_losses_total", ("seen_by", "owner")] >= 0
    assert found["belay_set_aside_total", ("what", "lost_runs")] == 0
    assert ("process_resident_memory_bytes",) in found


def test_requests_are_counted_by_route_over_all_web_processes(watched):
    change = Change(f"{watched.url}/metrics")
    for _ in range(20):  # one connection each, so that both processes get requests
        httpx.get(f"{watched.url}/threads/{uuid.uuid4()}")
        httpx.get(f"{watched.url}/nothing/here/{uuid.uuid4()}")
    labels = {"method": "GET", "route": "/threads/{thread_id}"}
    assert change.of("belay_http_requests_total", **labels, status="404") == 20
    assert change.of("belay_http_request_seconds_count", **labels) == 20
    lost = {"method": "GET", "route": "none", "status": "404"}
    assert change.of("belay_http_requests_total", **lost) == 20
    counted = httpx.get(f"{watched.url}/metrics?format=json").json()["api"]["http_requests_total"]
    assert {**labels, "status": "404", "value": 20.0} in counted


def test_open_streams_and_joins_are_counted_as_listeners(watched, web):
    def listening(of):
        return scraped(f"{watched.url}/metrics")["belay_listeners", ("of", of)]

    thread_id = new_thread(web)
    run_id = run_of(web, thread_id, "nodes", {"kind": "async_sleep"})
    before = listening("events"), listening("end")
    waiter = threading.Thread(
        target=httpx.get, args=(f"{watched.url}/threads/{thread_id}/runs/{run_id}/join",)
    )
    with web.stream("GET", f"/threads/{thread_id}/runs/{run_id}/stream") as stream:
        lines = stream.iter_lines()  # kept: closing it would close the stream
        next(lines)
        waiter.start()
        wait_until(
            lambda: (listening("events"), listening("end")) == (before[0] + 1, before[1] + 1),
            10,
            "two listeners",
        )
    web.post(f"/threads/{thread_id}/runs/{run_id}/cancel", params={"wait": "1"})
    waiter.join(10)
    wait_until(lambda: (listening("events"), listening("end")) == before, 10, "nobody")


def test_a_request_id_is_accepted_or_generated_and_always_returned(watched, web):
    for given in ("abc-1.2_X", "x" * 128):
        assert web.get("/ok", headers={"x-request-id": given}).headers["x-request-id"] == given
    for refused in ("", "a b", "x" * 129, "{0}", "a\tb", "a/b"):
        made = web.get("/ok", headers={"x-request-id": refused}).headers["x-request-id"]
        assert str(uuid.UUID(made)) == made
    for path in ("/nothing", "/threads/x", "/openapi.json", "/docs/"):
        answer = web.get(path, headers={"x-request-id": "mine"})
        assert answer.headers["x-request-id"] == "mine", path
    with web.stream("POST", "/runs/stream", json={"assistant_id": "counter"}) as stream:
        assert re.fullmatch(r"[0-9a-f-]{36}", stream.headers["x-request-id"])


def test_a_run_has_the_id_of_the_request_that_created_it(web):
    thread_id = new_thread(web)
    body = {"assistant_id": "counter", "input": {"count": 1}}
    answer = web.post(f"/threads/{thread_id}/runs", json=body, headers={"x-request-id": "mine-1"})
    configurable = answer.json()["kwargs"]["config"]["configurable"]
    assert configurable["langgraph_request_id"] == "mine-1"


def records(watched, program: str) -> list[dict]:
    """Return the JSON lines in the log of one program."""
    found = []
    for line in watched.log_lines():
        name, _, rest = line.partition("|")
        if name.strip() == program and rest.strip().startswith("{"):
            found.append(json.loads(rest))
    return found


def test_every_line_of_the_logs_is_json(watched, web):
    web.get("/ok")
    for program in ("web", "worker"):
        wait_until(lambda name=program: records(watched, name), 30, f"a line of {program}")
        lines = [
            line.partition("|")[2].strip()
            for line in watched.log_lines()
            if line.startswith(program)
        ]
        for line in lines:
            assert {"timestamp", "level", "logger", "message"} <= json.loads(line).keys()


def test_an_access_log_line_names_the_request_without_its_secrets(watched, web):
    request_id = uuid.uuid4().hex
    secret = f"secret-{uuid.uuid4()}"
    web.get(
        f"/threads/{uuid.uuid4()}?key={secret}",
        headers={"x-request-id": request_id, "x-api-key": secret},
    )
    web.post("/runs/wait", json={"assistant_id": "bad", "input": {"count": secret}})

    def mine():
        return [r for r in records(watched, "web") if r.get("request_id") == request_id]

    wait_until(mine, 5, "the line")
    (line,) = mine()
    assert (line["method"], line["status"], line["logger"]) == ("GET", 404, "belay.access")
    assert line["path"].startswith("/threads/")
    assert secret not in watched.log_until_now()


def test_log_lines_of_a_graph_have_the_ids_of_its_run(watched, web):
    thread_id = new_thread(web)
    run_id = run_of(web, thread_id, "talker", {"count": 1})
    web.get(f"/threads/{thread_id}/runs/{run_id}/join")

    def said():
        return [r for r in records(watched, "worker") if r["message"].startswith("talker")]

    wait_until(lambda: len(said()) == 2, 5, "two lines")
    for record in said():
        assert (record["run_id"], record["thread_id"]) == (run_id, thread_id)
        assert record["attempt"] == 1


def test_the_traceback_of_a_failed_node_is_in_the_log(watched, web):
    thread_id = new_thread(web)
    run_id = run_of(web, thread_id, "bad", {"count": 1})
    web.get(f"/threads/{thread_id}/runs/{run_id}/join")

    def failures():
        found = records(watched, "worker")
        return [r for r in found if r.get("run_id") == run_id and "exc_info" in r]

    [record] = wait_until(failures, 10, "the record")
    assert record["thread_id"] == thread_id
    assert 'raise ValueError("boom from bad node")' in record["exc_info"]


def test_the_log_line_of_a_kill_has_the_ids_of_its_run(impatient, impatient_web, beats):
    thread_id = new_thread(impatient_web)
    run_id = run_of(
        impatient_web, thread_id, "nodes", {"kind": "swallow_sync", "beats": str(beats)}
    )
    beats.wait_for("beat")
    impatient_web.post(f"/threads/{thread_id}/runs/{run_id}/cancel", params={"wait": "1"})
    killed = [r for r in records(impatient, "worker") if "did not stop when asked" in r["message"]]
    # The line is repeated while a busy machine has not completed the kill.
    record, *_ = [r for r in killed if r.get("run_id") == run_id]
    assert (record["thread_id"], record["attempt"]) == (thread_id, 1)


def test_the_counters_of_a_killed_child_are_kept(impatient, impatient_web, beats):
    change = Change(impatient.worker_metrics)
    thread_id = new_thread(impatient_web)
    for _ in range(3):
        wait_for(impatient_web, thread_id, "counter", {"count": 1})
    run_id = run_of(
        impatient_web, thread_id, "nodes", {"kind": "swallow_sync", "beats": str(beats)}
    )
    beats.wait_for("beat")
    impatient_web.post(f"/threads/{thread_id}/runs/{run_id}/cancel", params={"wait": "1"})
    assert change.of("belay_runs_ended_total", status="success") == 3


def test_metrics_have_the_names_of_the_reference_if_so_configured(watched):
    def values():
        text = httpx.get(f"{watched.url}/metrics", timeout=30).text
        lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in lines if name.startswith("lg_api_")}

    search = 'lg_api_http_requests_total{method="POST",route="/threads/search",status="200"}'
    before = values().get(search, 0.0)
    assert httpx.post(f"{watched.url}/threads/search", json={}, timeout=30).status_code == 200
    found = values()
    assert found[search] == before + 1
    assert found["lg_api_num_pending_runs"] == 0
    assert found["lg_api_num_running_runs"] >= 0
    assert found["lg_api_pending_runs_wait_time_max"] == 0
    latency = 'lg_api_http_requests_latency_seconds_count{method="POST",route="/threads/search"}'
    assert found[latency] >= 1
