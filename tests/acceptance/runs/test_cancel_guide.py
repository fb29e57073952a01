"""Every block of the cancel guide, in Python and curl, works as described.

The corrections of section 8 of the design apply. `runs.get(wait=True)`, `join(on_disconnect=)` and
`join_stream(on_disconnect=)` do not exist in the SDK, so the query parameter is used. Where a block
reads the status without having waited, the test polls.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess

import pytest
from langgraph_sdk.errors import NotFoundError

from tests.waiting import wait_until

LONG = {"messages": [{"role": "user", "content": "Long task"}]}
ASSISTANT = "agent"


@pytest.fixture(scope="module")
def server(newcomers_server):
    return newcomers_server


def curl(*arguments: str) -> str:
    done = subprocess.run(
        ["curl", "--silent", "--show-error", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout


def curl_json(server, method: str, path: str, body: str | None = None):
    import json

    arguments = ["--request", method, "--url", f"{server.url}{path}"]
    if body is not None:
        arguments += ["--header", "Content-Type: application/json", "--data", body]
    return json.loads(curl(*arguments) or "null")


def curl_status(server, method: str, path: str, body: str | None = None) -> int:
    arguments = ["--output", "/dev/null", "--write-out", "%{http_code}"]
    arguments += ["--request", method, "--url", f"{server.url}{path}"]
    if body is not None:
        arguments += ["--header", "Content-Type: application/json", "--data", body]
    return int(curl(*arguments))


CURL_BODY = (
    '{"assistant_id": "agent", "input": {"messages": [{"role": "user", "content": "long"}]}}'
)


def play(make_client, scene):
    async def run():
        async with make_client() as client:
            return await scene(client)

    return asyncio.run(run())


async def status_of(client, thread, run):
    return (await client.runs.get(thread["thread_id"], run["run_id"]))["status"]


async def until_status(client, thread, run, *wanted):
    for _ in range(1000):
        status = await status_of(client, thread, run)
        if status in wanted:
            return status
        await asyncio.sleep(0.01)
    raise AssertionError(f"never {wanted}, but {status}")


def test_cancel_with_interrupt_keeps_the_run_and_its_checkpoints(make_client):
    async def scene(client):
        thread = await client.threads.create()
        run = await client.runs.create(thread["thread_id"], ASSISTANT, input=LONG)
        while (await client.threads.get_state(thread["thread_id"]))["next"] != ["think"]:
            await asyncio.sleep(0.01)
        await client.runs.cancel(thread["thread_id"], run["run_id"])
        assert await until_status(client, thread, run, "interrupted") == "interrupted"
        after = await client.runs.get(thread["thread_id"], run["run_id"])
        assert after["kwargs"]["input"] == LONG
        history = await client.threads.get_history(thread["thread_id"], limit=10)
        assert history
        assert {state["metadata"]["run_id"] for state in history} == {run["run_id"]}
        # The state of the last completed step is kept, and the run can be resumed from there.
        state = await client.threads.get_state(thread["thread_id"])
        assert [m["content"] for m in state["values"]["messages"]] == ["Long task"]
        assert state["next"] == ["think"]

    play(make_client, scene)


def test_a_cancelled_run_is_resumed_from_its_checkpoint(make_client):
    async def scene(client):
        thread = await client.threads.create()
        # The second step takes long enough for the cancel on a busy machine.
        run = await client.runs.create(thread["thread_id"], "long_task", input={"seconds": 4})
        while (await client.threads.get_state(thread["thread_id"]))["next"] != ["sort"]:
            await asyncio.sleep(0.05)
        await client.runs.cancel(thread["thread_id"], run["run_id"], wait=True)
        state = await client.threads.get_state(thread["thread_id"])
        assert state["values"]["steps"] == ["collect"]
        assert state["next"] == ["sort"]
        await client.threads.update_state(thread["thread_id"], {"seconds": 0.05}, as_node="collect")
        values = await client.runs.wait(thread["thread_id"], "long_task", input=None)
        assert values["steps"] == ["collect", "sort", "write", "check"]

    play(make_client, scene)


def test_cancel_with_rollback_removes_the_run_and_its_checkpoints(make_client):
    async def scene(client):
        thread = await client.threads.create()
        await client.runs.wait(
            thread["thread_id"], ASSISTANT, input={"messages": [{"role": "user", "content": "hi"}]}
        )
        before = await client.threads.get(thread["thread_id"])
        history = await client.threads.get_history(thread["thread_id"], limit=100)
        run = await client.runs.create(thread["thread_id"], ASSISTANT, input=LONG)
        await until_status(client, thread, run, "running")
        await client.runs.cancel(thread["thread_id"], run["run_id"], action="rollback", wait=True)
        with pytest.raises(NotFoundError):
            await client.runs.get(thread["thread_id"], run["run_id"])
        assert run["run_id"] not in [
            r["run_id"] for r in await client.runs.list(thread["thread_id"])
        ]
        assert history == await client.threads.get_history(thread["thread_id"], limit=100)
        after = await client.threads.get(thread["thread_id"])
        assert {**before, "updated_at": 0} == {**after, "updated_at": 0}

    play(make_client, scene)


def test_cancel_without_wait_returns_while_the_run_still_runs(make_client):
    async def scene(client):
        thread = await client.threads.create()
        run = await client.runs.create(thread["thread_id"], ASSISTANT, input=LONG)
        await client.runs.cancel(thread["thread_id"], run["run_id"])
        assert await status_of(client, thread, run) in ("pending", "running", "interrupted")
        await client.runs.join(thread["thread_id"], run["run_id"])
        assert await status_of(client, thread, run) == "interrupted"

    play(make_client, scene)


def test_cancel_many_by_ids(make_client):
    async def scene(client):
        thread = await client.threads.create()
        run1 = await client.runs.create(thread["thread_id"], ASSISTANT, input=LONG)
        run2 = await client.runs.create(
            thread["thread_id"], ASSISTANT, input=LONG, multitask_strategy="enqueue"
        )
        await client.runs.cancel_many(
            thread_id=thread["thread_id"], run_ids=[run1["run_id"], run2["run_id"]]
        )
        await client.runs.join(thread["thread_id"], run2["run_id"])
        await client.runs.join(thread["thread_id"], run1["run_id"])
        runs = await client.runs.list(thread["thread_id"])
        assert {run1["run_id"]: "interrupted", run2["run_id"]: "interrupted"} == {
            run["run_id"]: run["status"] for run in runs
        }

    play(make_client, scene)


def test_cancel_many_by_status(make_client):
    async def scene(client):
        thread = await client.threads.create()
        run1 = await client.runs.create(thread["thread_id"], ASSISTANT, input=LONG)
        thread2 = await client.threads.create()
        run2 = await client.runs.create(thread2["thread_id"], ASSISTANT, input=LONG)
        await until_status(client, thread, run1, "running")
        await until_status(client, thread2, run2, "running")
        await client.runs.cancel_many(status="running")
        await client.runs.join(thread2["thread_id"], run2["run_id"])
        await client.runs.join(thread["thread_id"], run1["run_id"])
        assert await status_of(client, thread, run1) == "interrupted"
        assert await status_of(client, thread2, run2) == "interrupted"

    play(make_client, scene)


async def only_run(client, thread):
    for _ in range(500):
        runs = await client.runs.list(thread["thread_id"])
        if runs and runs[0]["status"] == "running":
            return runs[0]
        await asyncio.sleep(0.01)
    raise AssertionError("no run is running")


async def leave(task):
    """Cancel the client's task, as if a user had closed the app."""
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def follow(client, how, thread, run):
    """Return an awaitable that follows a run in one of four ways, each cancelling on disconnect."""
    if how == "wait":
        return client.runs.wait(thread["thread_id"], ASSISTANT, input=LONG, on_disconnect="cancel")
    if how == "join":
        return client.runs.join(
            thread["thread_id"], run["run_id"], params={"cancel_on_disconnect": "cancel"}
        )

    async def consume():
        if how == "stream":
            parts = client.runs.stream(
                thread["thread_id"], ASSISTANT, input=LONG, on_disconnect="cancel"
            )
        else:
            parts = client.runs.join_stream(
                thread["thread_id"], run["run_id"], cancel_on_disconnect=True
            )
        async for _ in parts:
            pass

    return consume()


@pytest.mark.parametrize("how", ["wait", "stream", "join", "join_stream"])
def test_cancel_on_disconnect(make_client, how):
    async def scene(client):
        thread = await client.threads.create()
        run = None
        if how.startswith("join"):
            run = await client.runs.create(thread["thread_id"], ASSISTANT, input=LONG)
        async with make_client() as leaving:
            task = asyncio.create_task(follow(leaving, how, thread, run))
            run = await only_run(client, thread)
            await asyncio.sleep(0.3)  # give the join time to begin, which cannot be observed
            assert await status_of(client, thread, run) == "running"
            await leave(task)
        assert await until_status(client, thread, run, "interrupted") == "interrupted"
        error = (await client.threads.get(thread["thread_id"]))["error"]
        assert "client disconnected from the run stream" in error["message"]

    play(make_client, scene)


def test_curl_cancel_with_interrupt(server, http):
    thread_id = curl_json(server, "POST", "/threads", "{}")["thread_id"]
    run = curl_json(server, "POST", f"/threads/{thread_id}/runs", CURL_BODY)
    path = f"/threads/{thread_id}/runs/{run['run_id']}"
    assert curl_status(server, "POST", f"{path}/cancel?wait=true") == 200
    assert curl_json(server, "GET", path)["status"] == "interrupted"


def test_curl_cancel_with_rollback(server, http):
    thread_id = curl_json(server, "POST", "/threads", "{}")["thread_id"]
    run = curl_json(server, "POST", f"/threads/{thread_id}/runs", CURL_BODY)
    path = f"/threads/{thread_id}/runs/{run['run_id']}"
    wait_until(lambda: curl_json(server, "GET", path)["status"] == "running")
    assert curl_status(server, "POST", f"{path}/cancel?action=rollback") == 202
    wait_until(lambda: curl_status(server, "GET", path) == 404)
    assert curl_json(server, "GET", f"/threads/{thread_id}/runs") == []


def test_curl_cancel_without_wait(server, http):
    thread_id = curl_json(server, "POST", "/threads", "{}")["thread_id"]
    run = curl_json(server, "POST", f"/threads/{thread_id}/runs", CURL_BODY)
    path = f"/threads/{thread_id}/runs/{run['run_id']}"
    assert curl_status(server, "POST", f"{path}/cancel") == 202
    assert curl_json(server, "GET", path)["status"] in ("pending", "running", "interrupted")
    wait_until(lambda: curl_json(server, "GET", path)["status"] == "interrupted")


def test_curl_cancel_many_by_ids(server, http):
    thread_id = curl_json(server, "POST", "/threads", "{}")["thread_id"]
    run_ids = [
        curl_json(server, "POST", f"/threads/{thread_id}/runs", CURL_BODY)["run_id"]
        for _ in range(2)
    ]
    body = f'{{"thread_id": "{thread_id}", "run_ids": ["{run_ids[0]}", "{run_ids[1]}"]}}'
    assert curl_status(server, "POST", "/runs/cancel?action=interrupt", body) == 204

    def statuses():
        runs = curl_json(server, "GET", f"/threads/{thread_id}/runs")
        return {run["run_id"]: run["status"] for run in runs}

    wait_until(lambda: statuses() == dict.fromkeys(run_ids, "interrupted"))


def test_curl_cancel_many_by_status(server, http):
    paths = []
    for _ in range(2):
        thread_id = curl_json(server, "POST", "/threads", "{}")["thread_id"]
        run = curl_json(server, "POST", f"/threads/{thread_id}/runs", CURL_BODY)
        paths.append(f"/threads/{thread_id}/runs/{run['run_id']}")
    for path in paths:
        wait_until(lambda p=path: curl_json(server, "GET", p)["status"] == "running")
    body = '{"status": "running"}'
    assert curl_status(server, "POST", "/runs/cancel?action=interrupt", body) == 204
    for path in paths:
        wait_until(lambda p=path: curl_json(server, "GET", p)["status"] == "interrupted")


@pytest.mark.parametrize(
    ("method", "path", "needs_run"),
    [
        ("POST", "/threads/{t}/runs/wait?on_disconnect=cancel", False),
        ("POST", "/threads/{t}/runs/stream?on_disconnect=cancel", False),
        ("GET", "/threads/{t}/runs/{r}/join?cancel_on_disconnect=cancel", True),
        ("GET", "/threads/{t}/runs/{r}/stream?cancel_on_disconnect=cancel", True),
        ("GET", "/threads/{t}/runs/{r}/join?on_disconnect=cancel", True),
        ("GET", "/threads/{t}/runs/{r}/stream?cancel_on_disconnect=1", True),
    ],
)
def test_curl_cancel_on_disconnect(server, http, method, path, needs_run):
    thread_id = curl_json(server, "POST", "/threads", "{}")["thread_id"]
    run_id = ""
    if needs_run:
        run_id = curl_json(server, "POST", f"/threads/{thread_id}/runs", CURL_BODY)["run_id"]
    command = ["curl", "--silent", "--request", method]
    command += ["--url", server.url + path.format(t=thread_id, r=run_id)]
    if method == "POST":
        command += ["--header", "Content-Type: application/json", "--data", CURL_BODY]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)

    def run():
        runs = curl_json(server, "GET", f"/threads/{thread_id}/runs")
        return runs[0] if runs and runs[0]["status"] == "running" else None

    running = wait_until(run)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)  # curl is waiting, so the server has received its request
    process.terminate()
    process.wait()
    run_path = f"/threads/{thread_id}/runs/{running['run_id']}"
    wait_until(lambda: curl_json(server, "GET", run_path)["status"] == "interrupted")
