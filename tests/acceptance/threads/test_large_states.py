"""States, outcomes and events that are too large to be decoded by a web process."""

from __future__ import annotations

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import httpx
import psycopg
import pytest

from tests.acceptance.playing import frames_of, new_thread, refused, run_of, wait_for
from tests.conformance import watched
from tests.waiting import wait_until

MIB = 1024 * 1024
#: Larger than BELAY_LARGE_STATE_BYTES of this server, smaller than its other limits.
LARGE = [{"number": number, "text": "é"} for number in range(20_000)]


@pytest.fixture(scope="module")
def large(make_server):
    live = make_server(
        "large",
        BELAY_HEARTBEAT_SECONDS="1",
        BELAY_LARGE_STATE_BYTES="20000",
        BELAY_MAX_ANSWER_BYTES=str(4 * MIB),
        BELAY_MAX_ANSWERS_BYTES=str(8 * MIB),
        BELAY_MAX_OUTCOME_BYTES=str(MIB),
        BELAY_BODY_SECONDS="3",
        BELAY_EXA_BETA_REQUIRED="0",
    ).start()
    yield live
    live.stop()


@pytest.fixture
def api(large):
    with watched(httpx.Client(base_url=large.url, timeout=60)) as client:
        yield client


@pytest.fixture
def thread_id(api):
    """Return the id of a thread whose state is large."""
    found = new_thread(api, graph_id="hostile")
    update(api, found, data=LARGE)
    return found


def update(api, thread_id, *, as_node="obey", **values):
    body = {"values": values, "as_node": as_node}
    response = api.post(f"/threads/{thread_id}/state", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def helpers(server):
    return server.find("belay_server.states")


def test_a_large_state_is_read_whole_and_in_parts(api, large, thread_id):
    state = api.get(f"/threads/{thread_id}/state").json()
    assert state["values"]["data"] == LARGE
    assert (state["next"], state["tasks"], state["interrupts"]) == ([], [], [])
    selected = api.get(f"/threads/{thread_id}/state?select=values.data&select=next").json()
    assert selected == {"values": {"data": LARGE}, "next": []}
    at = f"/threads/{thread_id}/state/{state['checkpoint_id']}"
    assert api.get(at).json() == state
    assert len(helpers(large)) == 1


def test_a_history_of_large_states_is_read_in_order(api, thread_id):
    update(api, thread_id, data=["small"])
    update(api, thread_id, data=LARGE[:10_000])
    states = api.get(f"/threads/{thread_id}/history?limit=10").json()
    assert [state["values"]["data"] for state in states] == [LARGE[:10_000], ["small"], LARGE]
    before = {"before": states[0]["checkpoint"], "limit": 1}
    assert api.post(f"/threads/{thread_id}/history", json=before).json() == states[1:2]


def test_an_update_of_a_large_state_is_streamed_to_its_clients(api, large, thread_id):
    path = f"/threads/{thread_id}/stream?stream_modes=state_update"
    with httpx.stream("GET", f"{large.url}{path}", timeout=30) as following:
        lines = following.iter_lines()
        update(api, thread_id, data=[*LARGE, "more"])
        data = next(line for line in lines if line.startswith("data: "))
    assert json.loads(data.removeprefix("data: "))["state"]["values"]["data"][-1] == "more"
    assert api.get(f"/threads/{thread_id}").json()["values"]["data"] == [*LARGE, "more"]


def test_a_refused_update_of_a_large_state_writes_nothing(api, thread_id):
    body = {"values": {"data": []}, "as_node": "nobody"}
    refused(api.post(f"/threads/{thread_id}/state", json=body), 400)
    unknown = {"values": {}, "as_node": "obey", "checkpoint_id": thread_id}
    refused(api.post(f"/threads/{thread_id}/state", json=unknown), 404)
    assert api.get(f"/threads/{thread_id}/state").json()["values"]["data"] == LARGE


def test_a_search_returns_and_extracts_large_values(api, thread_id):
    paths = {"last": "values.data[-1].number", "all": "values.data", "none": "values.x[0]"}
    body = {"ids": [thread_id], "extract": paths}
    (found,) = api.post("/threads/search", json=body).json()
    assert found["values"]["data"] == LARGE
    assert found["extracted"] == {"last": 19_999, "all": LARGE, "none": None}
    (found,) = api.post("/threads/search", json={**body, "select": ["thread_id"]}).json()
    assert found["extracted"]["last"] == 19_999
    by_value = {"values": {"data": [{"number": 7}]}, "ids": [thread_id], "select": ["thread_id"]}
    assert api.post("/threads/search", json=by_value).json() == [{"thread_id": thread_id}]


@pytest.mark.parametrize("size", [300_000, 3_000_000])
def test_a_large_outcome_is_returned_by_wait_join_and_stream(api, size):
    """Cover an outcome in the run's row, and one that is in its checkpoint only."""
    thread_id = new_thread(api)
    outcome = wait_for(api, thread_id, "hostile", {"size": size})
    assert outcome == {"size": size, "text": "x" * size}
    run_id = api.get(f"/threads/{thread_id}/runs").json()[0]["run_id"]
    assert api.get(f"/threads/{thread_id}/runs/{run_id}/join").json() == outcome
    body = {"assistant_id": "hostile", "input": {"size": size}, "stream_mode": ["values"]}
    with api.stream("POST", "/runs/stream", json=body) as response:
        assert frames_of(response.iter_lines())[-1].data == outcome


def test_the_streams_of_a_thread_send_large_events_whole(api, large):
    thread_id = new_thread(api)
    body = {"assistant_id": "hostile", "input": {"size": 600_000}, "stream_resumable": True}
    asked = {**body, "stream_mode": ["values", "updates", "tasks"]}
    api.post(f"/threads/{thread_id}/runs/wait", json=asked)
    whole = {"size": 600_000, "text": "x" * 600_000}
    path = f"{large.url}/threads/{thread_id}/stream"
    with httpx.stream("GET", path, headers={"Last-Event-ID": "-"}, timeout=30) as response:
        values = [one.data for one in until(response, "metadata", 2) if one.event == "values"]
    assert values[-1] == whole
    asked = {"channels": ["values", "updates", "tasks", "lifecycle"]}
    with httpx.stream("POST", f"{path}/events", json=asked, timeout=30) as response:
        events = [one.data for one in until(response, "lifecycle", 2)]
    data = {event["method"]: event["params"]["data"] for event in events}
    assert data["values"] == whole
    assert data["updates"] == {"node": "obey", "values": {"text": whole["text"]}}
    assert data["tasks"]["result"] == {"text": whole["text"]}


def until(response, name, count):
    """Return the frames of a stream up to the given number of events of a name."""
    lines = []
    for line in response.iter_lines():
        lines.append(line)
        if not line and sum(one == f"event: {name}" for one in lines) == count:
            return frames_of(lines)
    raise AssertionError("the stream has ended")


def test_an_agent_run_may_have_a_large_output(api):
    told = {"text": "t" * 200_000, "structured": [{"n": n} for n in range(30_000)]}
    body = {"query": "q", "input": {"data": [told]}, "outputSchema": {}}
    headers = {"x-api-key": "k"}
    run_id = api.post("/agent/runs", json=body, headers=headers).json()["id"]

    def ended():
        found = api.get(f"/agent/runs/{run_id}", headers=headers).json()
        return found if found["status"] == "completed" else None

    output = wait_until(ended, 20, "the agent run")["output"]
    assert output == {**told, "grounding": []}
    events = api.get(f"/agent/runs/{run_id}/events", headers=headers).json()["data"]
    assert events[-1]["data"]["output"] == output
    streamed = {**headers, "accept": "text/event-stream"}
    lines = api.get(f"/agent/runs/{run_id}/events", headers=streamed).text.splitlines()
    assert json.loads(lines[-2].removeprefix("data: "))["output"] == output


def test_a_state_above_the_limit_is_refused_but_runs_can_use_it(api, thread_id):
    error = wait_for(api, thread_id, "hostile", {"size": 5_000_000, "data": []})["__error__"]
    assert error["error"] == "StateTooLarge"
    said = refused(api.get(f"/threads/{thread_id}/state"), 422)
    assert "BELAY_MAX_ANSWER_BYTES" in said
    assert "Runs can still use it" in said
    refused(api.get(f"/threads/{thread_id}/history"), 422)
    body = {"values": {"data": []}, "as_node": "obey"}
    refused(api.post(f"/threads/{thread_id}/state", json=body), 422)
    assert api.get(f"/threads/{thread_id}").json()["values"] is None
    assert wait_for(api, thread_id, "hostile", {"size": 1})["text"] == "x"


def test_supersteps_are_stored_up_to_a_limit(api):
    """Each superstep stores all that it changes: a small body may become a large history."""
    text = "x" * 200_000
    step = {"updates": [{"values": {"steps": [text]}, "as_node": "s4"}]}
    body = {"graph_id": "steps", "supersteps": [step] * 5}
    thread_id = new_thread(api, **body)
    assert api.get(f"/threads/{thread_id}/state").json()["values"]["steps"] == [text] * 5
    said = refused(api.post("/threads", json={**body, "supersteps": [step] * 7}), 400)
    assert said.startswith("supersteps: the states have more than 4,194,304 bytes together")


def test_a_killed_state_process_is_restarted(api, large, thread_id):
    path = f"/threads/{thread_id}/state"
    assert api.get(path).status_code == 200
    (helper,) = helpers(large)
    helper.kill()
    assert api.get(path).json()["values"]["data"] == LARGE
    assert helpers(large)[0].pid != helper.pid


def count_states(api, thread_id) -> int:
    """Return the number of states, read in pages; all together may exceed the response limit."""
    count, wanted = 0, {"limit": 3}
    while page := api.post(f"/threads/{thread_id}/history", json=wanted).json():
        assert isinstance(page, list), page
        count += len(page)
        wanted["before"] = page[-1]["checkpoint"]
    return count


@pytest.mark.long
def test_an_update_whose_process_is_killed_is_written_at_most_once(api, large, thread_id):
    """The response is 200, or a 503 whose message says that the outcome is unknown."""
    accepted, unknown = set(), set()
    with ThreadPoolExecutor(1) as one:
        for number in range(12):
            body = {"values": {"data": [*LARGE, number]}, "as_node": "obey"}
            answer = one.submit(api.post, f"/threads/{thread_id}/state", json=body)
            time.sleep(number / 20)
            for helper in helpers(large):
                helper.kill()
            if answer.result().status_code == 200:
                accepted.add(number)
            else:
                refused(answer.result(), 503)
                unknown.add(number)
    states = api.get(f"/threads/{thread_id}/history?limit=3").json()
    count = count_states(api, thread_id)
    assert len(accepted) + 1 <= count <= len(accepted) + len(unknown) + 1
    assert states[0]["values"]["data"][-1] in accepted | unknown


@pytest.mark.long
def test_unread_joins_of_a_large_outcome_use_bounded_memory(api, large):
    thread_id = new_thread(api)
    wait_for(api, thread_id, "hostile", {"size": 3_500_000})
    run_id = api.get(f"/threads/{thread_id}/runs").json()[0]["run_id"]
    path = f"/threads/{thread_id}/runs/{run_id}/join"
    before = sum(p.memory_info().rss for p in large.find("gunicorn"))
    with ExitStack() as stack:
        for _ in range(6):
            one = stack.enter_context(socket.socket())
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            one.connect(("127.0.0.1", large.port))
            one.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            assert one.recv(12).endswith(b"200")
        # Another client's request waits until the connections that read nothing are closed.
        assert len(api.get(path).json()["text"]) == 3_500_000
        grown = sum(p.memory_info().rss for p in large.find("gunicorn")) - before
    assert grown < 20 * MIB


# --- concurrent updates and runs ------------------------------------------------------------------


@pytest.mark.parametrize("values", [["small"], LARGE])
def test_concurrent_updates_are_all_kept(api, values):
    thread_id = new_thread(api, graph_id="steps")
    update(api, thread_id, steps=values, as_node="s4")

    def write(name):
        update(api, thread_id, steps=[name], as_node="s4")

    names = [f"n{number}" for number in range(12)]
    with ThreadPoolExecutor(4) as four:
        list(four.map(write, names))
    found = api.get(f"/threads/{thread_id}/state").json()["values"]["steps"]
    assert found[: len(values)] == values
    assert sorted(found[len(values) :]) == sorted(names)


def test_updates_between_runs_lose_no_writes(api, large):
    """Updates are rejected while a run is in flight; the writes of both are kept."""
    thread_id = new_thread(api, graph_id="steps")
    written, runs = [], []
    with ExitStack() as stack:
        one = stack.enter_context(ThreadPoolExecutor(1))
        client = stack.enter_context(watched(httpx.Client(base_url=large.url, timeout=60)))
        until_this = time.monotonic() + 4

        def run():
            while time.monotonic() < until_this:
                runs.append(wait_for(client, thread_id, "steps", {"tag": f"r{len(runs)}"}))

        running = one.submit(run)
        while not running.done():
            body = {"values": {"steps": [f"u{len(written)}"]}, "as_node": "s4"}
            response = api.post(f"/threads/{thread_id}/state", json=body)
            if response.status_code == 200:
                written.append(body["values"]["steps"][0])
            else:
                refused(response, 409)
        running.result()
    steps = api.get(f"/threads/{thread_id}/state").json()["values"]["steps"]
    assert runs
    assert [step for step in steps if step.startswith("u")] == written
    assert len([step for step in steps if not step.startswith("u")]) == 4 * len(runs)


def test_large_values_are_read_after_a_killed_run(api, large):
    """The first request for the values has the separate process read them."""
    thread_id = new_thread(api, graph_id="hostile")
    update(api, thread_id, data=LARGE)
    run_id = run_of(api, thread_id, "hostile", {"seconds": 60})
    with psycopg.connect(large.database_url, autocommit=True) as conn:
        wait_until(
            lambda: conn.execute(
                "SELECT 1 FROM checkpoints WHERE metadata ->> 'run_id' = %s", (run_id,)
            ).fetchone(),
            20,
            "a checkpoint of the run",
        )
        api.post(f"/threads/{thread_id}/runs/{run_id}/cancel?wait=1")
        conn.execute("UPDATE thread SET values_known = false WHERE thread_id = %s", (thread_id,))
        conn.execute("UPDATE run SET outcome = NULL WHERE run_id = %s", (run_id,))
    assert api.get(f"/threads/{thread_id}").json()["values"]["data"] == LARGE
    joined = api.get(f"/threads/{thread_id}/runs/{run_id}/join").json()
    assert joined["data"] == LARGE


def test_large_events_of_every_kind_are_translated_into_the_protocol(api):
    thread_id = new_thread(api)
    topic, setting = "t" * 300_000, "s" * 300_000
    body = {
        "assistant_id": "questions",
        "input": {"topic": topic},
        "config": {"configurable": {"setting": setting}},
        "stream_mode": ["values", "updates", "tasks", "checkpoints"],
    }
    api.post(f"/threads/{thread_id}/runs/wait", json=body)
    channels = ["values", "updates", "tasks", "checkpoints", "input", "lifecycle"]
    path = f"/threads/{thread_id}/stream/events"
    methods, payload = set(), None
    with api.stream("POST", path, json={"channels": channels}) as response:
        for line in response.iter_lines():
            if not line.startswith("data: "):
                continue
            event = json.loads(line.removeprefix("data: "))
            methods.add(event["method"])
            data = event["params"]["data"]
            if event["method"] == "input.requested":
                payload = data["payload"]
            if event["method"] == "lifecycle" and data["event"] == "interrupted":
                break
    assert payload == {"question": f"first about {topic}?"}
    assert methods >= {"values", "updates", "tasks", "checkpoints", "input.requested", "lifecycle"}
