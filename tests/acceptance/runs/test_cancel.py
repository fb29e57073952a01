"""The responses to a cancel agree with the run's row, thread and state, with waits and streams."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import psycopg
import pytest
from langgraph_sdk.errors import NotFoundError

from tests.acceptance.playing import stream
from tests.conformance import watched
from tests.waiting import wait_until

NOTHING_FOUND = {"detail": "No runs found to cancel."}
NOTHING_MATCHES = {
    "detail": "No matching runs to cancel. Please verify the thread ID and run IDs are correct, "
    "and the runs haven't been deleted or completed."
}
ROUTE = "POST /threads/{thread_id}/runs/{run_id}/cancel"


@pytest.fixture
def thread_id(sync_client):
    return sync_client.threads.create()["thread_id"]


def create(client, thread_id, beats, *, seconds=60, graph="steps", **options):
    return client.runs.create(
        thread_id, graph, input={"seconds": seconds, "beats": str(beats)}, **options
    )["run_id"]


def running(client, thread_id, beats, **options):
    run_id = create(client, thread_id, beats, **options)
    beats.wait_for("s1:start")
    return run_id


def cancel(http, thread_id, run_id, **params):
    return http.post(f"/threads/{thread_id}/runs/{run_id}/cancel", params=params)


@pytest.mark.parametrize("wait", ["1", "true"])
def test_a_cancel_with_wait_returns_200_after_the_run_has_ended(
    http, sync_client, thread_id, beats, wait
):
    run_id = running(sync_client, thread_id, beats)
    answer = cancel(http, thread_id, run_id, wait=wait)
    assert (answer.status_code, answer.json()) == (200, {})
    assert answer.headers["location"] == f"/threads/{thread_id}/runs/{run_id}/join"
    assert answer.headers["content-location"] == f"/threads/{thread_id}/runs/{run_id}"
    assert sync_client.runs.get(thread_id, run_id)["status"] == "interrupted"


def test_a_cancel_without_wait_returns_202_before_the_run_has_ended(
    http, sync_client, thread_id, beats
):
    run = sync_client.runs.create(
        thread_id, "nodes", input={"kind": "swallow_sync", "beats": str(beats)}
    )
    beats.wait_for("beat")
    answer = cancel(http, thread_id, run["run_id"])
    assert (answer.status_code, answer.content) == (202, b"")
    assert sync_client.runs.get(thread_id, run["run_id"])["status"] == "running"
    assert sync_client.threads.get(thread_id)["status"] == "busy"
    wait_until(lambda: sync_client.runs.get(thread_id, run["run_id"])["status"] == "interrupted")
    assert sync_client.threads.get(thread_id)["status"] == "interrupted"


def test_cancelling_an_ended_or_unknown_run_is_404_with_distinct_details(
    http, sync_client, thread_id, beats
):
    sync_client.runs.wait(thread_id, "counter", input={"count": 1})
    ended = sync_client.runs.list(thread_id)[0]["run_id"]
    cancelled = running(sync_client, thread_id, beats)
    cancel(http, thread_id, cancelled, wait=1)
    other = sync_client.threads.create()["thread_id"]
    unknown = "01a1fb42-26fe-7244-abf0-02a7b8f2301a"
    for run_id, thread, expected in [
        (ended, thread_id, NOTHING_MATCHES),
        (cancelled, thread_id, NOTHING_MATCHES),
        (unknown, thread_id, NOTHING_FOUND),
        (ended, other, NOTHING_FOUND),
        (ended, unknown, NOTHING_FOUND),
    ]:
        for action in ("interrupt", "rollback"):
            answer = cancel(http, thread, run_id, action=action, wait=1)
            assert (404, expected) == (answer.status_code, answer.json())


def test_an_unknown_action_is_422_and_cancels_nothing(http, sync_client, thread_id, beats):
    run_id = running(sync_client, thread_id, beats)
    assert cancel(http, thread_id, run_id, action="stop").status_code == 422
    assert sync_client.runs.get(thread_id, run_id)["status"] == "running"
    cancel(http, thread_id, run_id, wait=1)


@pytest.mark.parametrize(("action", "error"), [("interrupt", "UserInterrupt"), ("rollback", None)])
def test_the_error_of_the_thread_names_the_route_that_interrupted_it(
    http, sync_client, thread_id, beats, action, error
):
    run_id = running(sync_client, thread_id, beats)
    cancel(http, thread_id, run_id, wait=1, action=action)
    thread = sync_client.threads.get(thread_id)
    if error is None:
        assert thread.get("error") is None
    else:
        assert thread["error"] == {"error": error, "message": f"{action} requested via {ROUTE}"}
    sync_client.runs.wait(thread_id, "counter", input={"count": 1})
    assert sync_client.threads.get(thread_id)["error"] is None


@pytest.mark.parametrize(
    ("action", "marker"),
    [("interrupt", ("interrupted", "UserInterrupt")), ("rollback", ("rollback", "UserRollback"))],
)
def test_a_cancel_ends_streams_with_a_marker_and_releases_joins(make_client, beats, action, marker):
    async def scene():
        async with make_client() as client:
            thread_id = (await client.threads.create())["thread_id"]
            run = await client.runs.create(
                thread_id, "steps", input={"seconds": 60, "beats": str(beats)}
            )

            async def follow():
                parts = client.runs.join_stream(thread_id, run["run_id"])
                return [part async for part in parts]

            following = asyncio.create_task(follow())
            waiting = asyncio.create_task(client.runs.join(thread_id, run["run_id"]))
            await asyncio.to_thread(beats.wait_for, "s1:start")
            await client.runs.cancel(thread_id, run["run_id"], action=action, wait=True)
            return await following, await waiting

    parts, outcome = asyncio.run(scene())
    assert parts[-1].event == "end"
    assert marker == (parts[-1].data["status"], parts[-1].data["error"])
    if action == "interrupt":
        assert outcome["seconds"] == 60
    else:
        assert outcome["__error__"]["error"] == "UserRollback"


@pytest.mark.parametrize("action", ["interrupt", "rollback"])
def test_a_cancelled_pending_run_never_starts_nor_affects_the_running_one(
    http, sync_client, thread_id, beats, tmp_path, action
):
    first = running(sync_client, thread_id, beats)
    from tests.conftest import Beats

    waiting = Beats(tmp_path / "waiting")
    second = create(sync_client, thread_id, waiting)
    before = sync_client.threads.get(thread_id)
    assert cancel(http, thread_id, second, wait=1, action=action).status_code == 200
    assert before == sync_client.threads.get(thread_id)
    assert sync_client.runs.get(thread_id, first)["status"] == "running"
    if action == "interrupt":
        assert sync_client.runs.get(thread_id, second)["status"] == "interrupted"
    else:
        with pytest.raises(NotFoundError):
            sync_client.runs.get(thread_id, second)
    cancel(http, thread_id, first, wait=1)
    assert sync_client.runs.wait(thread_id, "counter", input={"count": 1})["count"] == 2
    assert waiting.lines() == []


@pytest.mark.parametrize("action", ["interrupt", "rollback"])
def test_a_cancelled_delayed_run_never_starts(http, sync_client, thread_id, beats, action):
    run_id = create(sync_client, thread_id, beats, after_seconds=1)
    assert cancel(http, thread_id, run_id, action=action).status_code == 202
    assert sync_client.threads.get(thread_id)["status"] == "idle"
    time.sleep(2)  # past its due time: nothing may happen meanwhile
    assert beats.lines() == []


def test_no_node_of_a_new_run_starts_after_its_cancel_has_returned(http, sync_client, tmp_path):
    """Cancel at moments between the doorbell, the claim and the first node."""
    from tests.conftest import Beats

    for number in range(40):
        beats = Beats(tmp_path / str(number))
        thread_id = sync_client.threads.create()["thread_id"]
        run_id = create(sync_client, thread_id, beats, seconds=0.2)
        if number % 4:
            time.sleep(number / 4000)  # a different moment each time
        assert cancel(http, thread_id, run_id, wait=1).status_code == 200
        before = beats.lines()
        assert sync_client.threads.get(thread_id)["status"] in ("idle", "interrupted")
        time.sleep(0.03)
        assert before == beats.lines()


def test_twenty_concurrent_interrupts_and_rollbacks_agree_on_one_outcome(
    server, sync_client, thread_id, beats
):
    run_id = running(sync_client, thread_id, beats)

    def one(number):
        with watched(httpx.Client(base_url=server.url, timeout=60)) as http:
            action = "rollback" if number % 2 else "interrupt"
            return cancel(http, thread_id, run_id, action=action, wait=number % 3).status_code

    with ThreadPoolExecutor(20) as pool:
        statuses = list(pool.map(one, range(20)))
    assert set(statuses) <= {200, 202, 404}
    assert {200, 202} & set(statuses)
    wait_until(lambda: sync_client.threads.get(thread_id)["status"] != "busy")
    runs = sync_client.runs.list(thread_id)
    assert [run["status"] for run in runs] in ([], ["interrupted"])


def test_a_rollback_takes_precedence_over_an_earlier_interrupt(
    server, http, sync_client, thread_id, beats
):
    run = sync_client.runs.create(
        thread_id, "nodes", input={"kind": "swallow_sync", "beats": str(beats)}
    )
    beats.wait_for("beat")
    server.worker_parent().suspend()  # until both are accepted
    try:
        assert cancel(http, thread_id, run["run_id"], action="interrupt").status_code == 202
        assert cancel(http, thread_id, run["run_id"], action="rollback").status_code == 202
    finally:
        server.worker_parent().resume()
    assert cancel(http, thread_id, run["run_id"], action="interrupt", wait=1).status_code == 200
    assert sync_client.runs.list(thread_id) == []


def test_the_row_alone_cancels_without_flag_or_nudge(server, http, sync_client, thread_id, beats):
    """The row in Postgres decides: without flag and nudge the cancel takes one lease renewal."""
    run_id = running(sync_client, thread_id, beats)
    with psycopg.connect(server.database_url, autocommit=True) as database:
        database.execute(
            "UPDATE run SET cancel_action = 'interrupt', cancel_reason = '{}' WHERE run_id = %s",
            (run_id,),
        )
    wait_until(lambda: sync_client.runs.get(thread_id, run_id)["status"] == "interrupted", 15)


def test_a_forged_flag_cancels_nothing(server, http, sync_client, thread_id, beats):
    import redis

    environ = next(p for p in server.find("gunicorn")).environ()
    run_id = running(sync_client, thread_id, beats)
    with redis.Redis.from_url(environ["REDIS_URL"]) as bus:
        bus.set(f"belay:cancel:{run_id}", "interrupt")
        bus.publish("belay:cancels", run_id)
        bus.publish("belay:cancels", "\x00garbage")
        bus.publish("belay:dirty", f"{run_id}!")
        wait_until(lambda: beats.names().count("s1:beat") > 20)
        assert sync_client.runs.get(thread_id, run_id)["status"] == "running"
        bus.delete(f"belay:cancel:{run_id}")
    cancel(http, thread_id, run_id, wait=1)


def bulk(http, action="interrupt", **body):
    return http.post("/runs/cancel", params={"action": action}, json=body)


@pytest.mark.parametrize("action", ["interrupt", "rollback"])
@pytest.mark.parametrize("status", ["pending", "running", "all"])
def test_a_bulk_cancel_by_status_covers_all_threads(http, sync_client, tmp_path, action, status):
    from tests.conftest import Beats

    threads = [sync_client.threads.create()["thread_id"] for _ in range(2)]
    first = [running(sync_client, t, Beats(tmp_path / t)) for t in threads]
    second = [create(sync_client, t, tmp_path / "waiting", seconds=60) for t in threads]
    assert bulk(http, action, status=status).status_code == 204
    hit = {"pending": second, "running": first, "all": first + second}[status]

    def ended():
        left = {run["run_id"]: run["status"] for t in threads for run in sync_client.runs.list(t)}
        gone = "interrupted" if action == "interrupt" else None
        return all(left.get(run_id) == gone for run_id in hit)

    wait_until(ended)
    bulk(http, status="all")
    wait_until(lambda: all(sync_client.threads.get(t)["status"] != "busy" for t in threads))


def test_a_bulk_cancel_by_ids_may_be_narrowed_by_status(http, sync_client, thread_id, beats):
    run_id = running(sync_client, thread_id, beats)
    queued = create(sync_client, thread_id, beats)
    unknown = "01a1fb42-26fe-7244-abf0-02a7b8f2301a"
    both = {"status": "pending", "thread_id": thread_id, "run_ids": [run_id, queued, unknown]}
    assert bulk(http, **both).status_code == 204
    assert sync_client.runs.get(thread_id, queued)["status"] == "interrupted"
    assert sync_client.runs.get(thread_id, run_id)["status"] == "running"
    assert bulk(http, thread_id=thread_id, run_ids=[run_id, unknown]).status_code == 204
    wait_until(lambda: sync_client.runs.get(thread_id, run_id)["status"] == "interrupted")
    answer = bulk(http, thread_id=thread_id, run_ids=[run_id])
    assert (answer.status_code, answer.json()) == (404, NOTHING_MATCHES)
    answer = bulk(http, thread_id=thread_id, run_ids=[unknown])
    assert (answer.status_code, answer.json()) == (404, NOTHING_FOUND)
    answer = bulk(http, thread_id=thread_id, run_ids=[])
    assert (answer.status_code, answer.json()) == (404, NOTHING_FOUND)
    answer = bulk(http, status="all")
    assert (answer.status_code, answer.json()) == (404, NOTHING_FOUND)


def test_a_bulk_cancel_cancels_a_thousand_runs(server, http, sync_client, thread_id, beats):
    running(sync_client, thread_id, beats)
    with psycopg.connect(server.database_url, autocommit=True) as database:
        database.execute(
            """
            INSERT INTO run (run_id, thread_id, assistant_id, graph_id, queue, metadata, kwargs,
                multitask_strategy, next_ring_at)
            SELECT gen_random_uuid(), thread_id, assistant_id, graph_id, queue, metadata, kwargs,
                multitask_strategy, now() + interval '1 hour'
            FROM run, generate_series(1, 999) WHERE thread_id = %s
            """,
            (thread_id,),
        )
    assert bulk(http, status="all").status_code == 204
    wait_until(lambda: sync_client.threads.get(thread_id)["status"] != "busy")
    found = sync_client.runs.list(thread_id, limit=1000)
    assert (1000, {"interrupted"}) == (len(found), {run["status"] for run in found})


def test_a_timeout_stops_any_node_and_is_reported(http, sync_client, beats):
    for graph, kind in (("steps", None), ("nodes", "swallow_sync"), ("nodes", "time_sleep")):
        thread_id = sync_client.threads.create()["thread_id"]
        body = {
            "assistant_id": graph,
            "input": {"seconds": 60, "kind": kind, "beats": str(beats)},
            "timeout_seconds": 0.5,
        }
        _, frames = stream(http, "POST", f"/threads/{thread_id}/runs/stream", json=body)
        assert frames[-1].event == "error", (kind, frames)
        assert frames[-1].data["error"] == "TimeoutError"
        run = sync_client.runs.list(thread_id)[0]
        assert run["status"] == "timeout"
        assert sync_client.threads.get(thread_id)["status"] == "error"
        outcome = sync_client.runs.join(thread_id, run["run_id"])
        assert outcome["__error__"]["error"] == "TimeoutError"
        before = beats.lines()
        time.sleep(0.2)  # nothing may happen meanwhile
        assert before == beats.lines()


@pytest.mark.parametrize("strategy", ["interrupt", "rollback"])
def test_ten_concurrent_runs_that_supersede_end_with_one_success(
    server, sync_client, thread_id, strategy
):
    def one(number):
        with watched(httpx.Client(base_url=server.url, timeout=60)) as http:
            body = {
                "assistant_id": "steps",
                "input": {"seconds": 0.2},
                "multitask_strategy": strategy,
            }
            return http.post(f"/threads/{thread_id}/runs", json=body).status_code

    with ThreadPoolExecutor(10) as pool:
        assert list(pool.map(one, range(10))) == [200] * 10
    wait_until(lambda: sync_client.threads.get(thread_id)["status"] != "busy")
    statuses = [run["status"] for run in sync_client.runs.list(thread_id, limit=20)]
    interrupted = 9 if strategy == "interrupt" else 0
    assert sorted(statuses) == ["interrupted"] * interrupted + ["success"]


@pytest.mark.parametrize("path", ["/runs/wait", "/runs/stream"])
def test_a_stateless_run_is_cancelled_when_its_client_disconnects(server, beats, path):
    body = {
        "assistant_id": "steps",
        "input": {"seconds": 60, "beats": str(beats)},
        "on_disconnect": "cancel",
    }
    with (
        watched(httpx.Client(base_url=server.url, timeout=60)) as leaving,
        leaving.stream("POST", path, json=body) as answer,
    ):
        assert answer.status_code == 200
        beats.wait_for("s1:beat", 3)
    with psycopg.connect(server.database_url, autocommit=True) as database:

        def status():
            return database.execute(
                "SELECT status FROM run WHERE kwargs -> 'input' ->> 'beats' = %s", (str(beats),)
            ).fetchone()[0]

        wait_until(lambda: status() == "interrupted")
    before = beats.lines()
    time.sleep(0.2)  # nothing may happen meanwhile
    assert before == beats.lines()


@pytest.mark.parametrize("strategy", ["interrupt", "rollback"])
def test_a_superseding_run_starts_only_after_the_old_one_has_stopped(
    sync_client, thread_id, beats, strategy
):
    old = sync_client.runs.create(
        thread_id, "nodes", input={"kind": "swallow_sync", "beats": str(beats)}
    )
    beats.wait_for("beat")
    new = sync_client.runs.create(
        thread_id, "steps", input={"beats": str(beats)}, multitask_strategy=strategy
    )
    sync_client.runs.join(thread_id, new["run_id"])
    names = beats.names()
    assert "beat" not in names[names.index("s1:start") :]
    if strategy == "interrupt":
        assert sync_client.runs.get(thread_id, old["run_id"])["status"] == "interrupted"
    else:
        assert len(sync_client.runs.list(thread_id)) == 1


def test_deleting_a_running_run_stops_it_first(http, sync_client, thread_id, beats):
    run_id = running(sync_client, thread_id, beats)
    answer = http.delete(f"/threads/{thread_id}/runs/{run_id}")
    assert (answer.status_code, answer.json()) == (200, {})
    before = beats.lines()
    assert sync_client.runs.list(thread_id) == []
    assert sync_client.threads.get(thread_id)["status"] == "interrupted"
    time.sleep(0.2)  # nothing may happen meanwhile
    assert before == beats.lines()
    assert http.delete(f"/threads/{thread_id}/runs/{run_id}").status_code == 404


def test_deleting_an_assistant_stops_its_runs(http, sync_client, thread_id, beats):
    assistant = sync_client.assistants.create("steps")["assistant_id"]
    running_id = sync_client.runs.create(
        thread_id, assistant, input={"seconds": 60, "beats": str(beats)}
    )["run_id"]
    waiting_id = sync_client.runs.create(thread_id, assistant, input={})["run_id"]
    beats.wait_for("s1:start")
    assert http.delete(f"/assistants/{assistant}").status_code == 204
    before = beats.lines()
    statuses = {run["run_id"]: run["status"] for run in sync_client.runs.list(thread_id)}
    assert statuses == {running_id: "interrupted", waiting_id: "interrupted"}
    time.sleep(0.2)  # nothing may happen meanwhile
    assert before == beats.lines()
    assert http.delete(f"/assistants/{assistant}").status_code == 404
    answer = http.post(f"/threads/{thread_id}/runs", json={"assistant_id": assistant})
    assert answer.status_code == 404
    system = sync_client.assistants.search(graph_id="steps", metadata={"created_by": "system"})
    of_graph = system[0]["assistant_id"]
    assert http.delete(f"/assistants/{of_graph}").status_code == 409


def test_a_node_is_not_retried_after_its_run_was_cancelled(http, sync_client, thread_id, beats):
    run = sync_client.runs.create(thread_id, "retrying", input={"beats": str(beats)})
    beats.wait_for("try", 2)
    assert cancel(http, thread_id, run["run_id"], wait=1).status_code == 200
    before = beats.lines()
    time.sleep(0.5)  # several attempts long: nothing may happen meanwhile
    assert before == beats.lines()


def test_a_thread_recreated_after_its_deletion_has_no_runs_and_no_state(
    http, sync_client, thread_id, beats
):
    running(sync_client, thread_id, beats, seconds=60)
    create(sync_client, thread_id, beats)
    assert http.delete(f"/threads/{thread_id}").status_code == 204
    before = beats.lines()
    sync_client.threads.create(thread_id=thread_id)
    state = sync_client.threads.get_state(thread_id)
    assert (state["values"], sync_client.runs.list(thread_id)) == ({}, [])
    time.sleep(0.2)  # nothing may happen meanwhile
    assert before == beats.lines()
    assert sync_client.threads.get_history(thread_id, limit=10) == []
