"""Streams under faults: a killed worker, another web process, and clients that do not read."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from contextlib import ExitStack, contextmanager
from urllib.parse import urlsplit

import httpx
import orjson
import psutil
import psycopg
import pytest
import redis

from tests.acceptance.playing import frames_of
from tests.faults.conftest import Probe
from tests.long_forms import full_case, long_case
from tests.waiting import wait_until

STEPS = ["s1", "s2", "s3", "s4"]
MODES = ["values", "updates", "tasks"]


def read(url, thread_id, run_id, last_event_id, count=None):
    """Return the frames after an event, all of them or the first `count`."""
    lines = []
    with (
        httpx.Client(base_url=url, timeout=60) as client,
        client.stream(
            "GET",
            f"/threads/{thread_id}/runs/{run_id}/stream",
            headers={"Last-Event-ID": last_event_id},
        ) as answer,
    ):
        assert answer.status_code == 200, answer.read()
        for line in answer.iter_lines():
            lines.append(line)
            if count is not None and line == "" and len(frames_of(lines)) >= count:
                break
    return frames_of(lines)


def position(frame):
    return tuple(map(int, frame.id.split("-")))


@pytest.mark.parametrize("durability", ["async", full_case("sync")])
def test_a_stream_continues_with_the_next_attempt_on_another_web_process(
    cluster, tmp_path, durability
):
    with httpx.Client(base_url=cluster.url) as http:
        thread_id = http.post("/threads", json={}).json()["thread_id"]
        history = tmp_path / "history"
        body = {
            "assistant_id": "probe",
            "input": {"tag": "t", "history": str(history), "seconds": 0.5},
            "stream_mode": MODES,
            "stream_resumable": True,
            "durability": durability,
        }
        run_id = http.post(f"/threads/{thread_id}/runs", json=body).json()["run_id"]
        first, second = cluster.urls
        frames = read(first, thread_id, run_id, "-1", count=3)
        probe = Probe(cluster, None, history)

        def in_s3():
            return [b for b in probe.beats("t") if (b.node, b.event) == ("s3", "start")]

        wait_until(in_s3, 30, "the third step")
        # With `async`, a step's writes are stored a moment later; before, it would run again.
        state = f"/threads/{thread_id}/state"
        wait_until(lambda: http.get(state).json()["next"] == ["s3"], 30, "what s2 wrote")
        os.kill(in_s3()[0].pid, signal.SIGKILL)
        frames += read(second, thread_id, run_id, frames[-1].id, count=5)
        frames += read(first, thread_id, run_id, frames[-1].id)
    attempts = [f.data["attempt"] for f in frames if f.event == "metadata"]
    assert attempts == [1, 2]
    assert sorted({position(f) for f in frames}) == [position(f) for f in frames]
    done = [f.data.get("done", []) for f in frames if f.event == "values"]
    assert done == [[f"t:{step}" for step in STEPS[:n]] for n in range(5)]
    updates = [next(iter(f.data)) for f in frames if f.event == "updates"]
    assert updates == STEPS
    starts = [f.data["name"] for f in frames if f.event == "tasks" and "input" in f.data]
    assert starts == ["s1", "s2", "s3", "s3", "s4"]
    # After the end the whole stream can be read again, on the other web process too.
    for url in cluster.urls:
        assert read(url, thread_id, run_id, "-1") == frames


def follower_that_does_not_read(url, path, stack):
    """Open a stream from its start with a client that does not read it."""
    parts = urlsplit(url)
    sock = stack.enter_context(socket.create_connection((parts.hostname, parts.port)))
    sock.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nLast-Event-ID: -1\r\n\r\n".encode())
    return sock


@contextmanager
def reading_a_byte_a_second(socks):
    """Read one byte a second from each socket; yield the bytes read so far."""
    enough = threading.Event()
    received = [bytearray() for _ in socks]

    def read_slowly():
        while not enough.wait(1.0):
            for sock, so_far in zip(socks, received, strict=True):
                so_far.extend(sock.recv(1))

    reading = threading.Thread(target=read_slowly)
    reading.start()
    try:
        yield received
    finally:
        enough.set()
    reading.join()


def web_memory(cluster):
    members = [member.pid for member in cluster.webs]
    processes = [psutil.Process(pid) for pid in members]
    processes += [child for process in processes for child in process.children()]
    return sum(process.memory_full_info().uss for process in processes)


#: The backlog of one reader (256 KB and the entry that exceeded it), its connection, and as
#: much again for the allocator.
BYTES_PER_SLOW_READER = 600_000


@pytest.mark.parametrize(
    ("readers", "megabytes"), [long_case(60, 20), full_case(500, 60)], ids=["60", "500"]
)
def test_slow_readers_neither_delay_runs_nor_exhaust_the_memory(
    cluster, client, readers, megabytes
):
    """The bound is lower than all events held once per reader. The events fit into one event log
    (BELAY_EVENT_LOG_MAX_BYTES, 64 MiB)."""
    flood = {"count": megabytes * 100, "size": 10_000}
    thread_id = client.threads.create()["thread_id"]
    before = web_memory(cluster)
    run = client.runs.create(
        thread_id, "flood", input=flood, stream_mode="custom", stream_resumable=True
    )
    path = f"/threads/{thread_id}/runs/{run['run_id']}/stream"
    with ExitStack() as stack:
        socks = [follower_that_does_not_read(cluster.url, path, stack) for _ in range(readers)]
        received = stack.enter_context(reading_a_byte_a_second(socks))
        client.runs.join(thread_id, run["run_id"])
        assert client.runs.wait(None, "counter", input={"count": 1}) == {"count": 2}
        # A stream that is read arrives whole while the others are blocked.
        frames = read(cluster.url, thread_id, run["run_id"], "-1")
        assert [f.data["n"] for f in frames if f.event == "custom"] == list(range(flood["count"]))
        wait_until(lambda: all(len(so_far) >= 4 for so_far in received), 30, "four bytes each")
        assert web_memory(cluster) - before < 60e6 + readers * BYTES_PER_SLOW_READER


def test_a_reader_that_has_paused_gets_the_remaining_events(cluster, client):
    thread_id = client.threads.create()["thread_id"]
    flood = {"count": 800, "size": 10_000}
    run = client.runs.create(
        thread_id, "flood", input=flood, stream_mode="custom", stream_resumable=True
    )
    path = f"/threads/{thread_id}/runs/{run['run_id']}/stream"
    with ExitStack() as stack:
        sock = follower_that_does_not_read(cluster.url, path, stack)
        client.runs.join(thread_id, run["run_id"])
        time.sleep(1.5)  # longer than it takes to fill every buffer
        received = bytearray()
        while not received.endswith(b"0\r\n\r\n"):
            received += sock.recv(65536)
    numbers = [
        orjson.loads(line[6:])["n"]
        for line in bytes(received).split(b"\n")
        if line.startswith(b'data: {"n"') and line.endswith(b"}")
    ]
    assert numbers[0] == 0
    assert numbers[-1] == flood["count"] - 1


@pytest.mark.parametrize(
    ("count", "size"), [(30_000, 10), (1, 10_000_000), (5, 3_000_000)], ids=str
)
def test_many_or_large_events_at_once_are_all_streamed(client, count, size):
    seen = [
        (part.data["n"], len(part.data["text"]))
        for part in client.runs.stream(
            None, "flood", input={"count": count, "size": size}, stream_mode="custom"
        )
        if part.event == "custom"
    ]
    assert seen == [(n, size) for n in range(count)]


def test_fifty_readers_of_a_run_get_the_same_events(cluster, client):
    thread_id = client.threads.create()["thread_id"]
    run = client.runs.create(thread_id, "steps", input={"seconds": 0.3}, stream_resumable=True)
    found: list[list] = []
    followers = [
        threading.Thread(
            target=lambda: found.append(read(cluster.url, thread_id, run["run_id"], "-1"))
        )
        for _ in range(50)
    ]
    for follower in followers:
        follower.start()
    for follower in followers:
        follower.join(60)
    assert len(found) == 50
    different = {repr(frames) for frames in found}
    assert len(different) == 1, different
    assert len(found[0]) == 6


def test_listeners_share_the_connections_of_their_web_process(cluster, client):
    thread_id = client.threads.create()["thread_id"]
    run = client.runs.create(thread_id, "steps", input={"seconds": 20})
    path = f"/threads/{thread_id}/runs/{run['run_id']}/stream"

    def connections():
        with (
            redis.Redis.from_url(cluster.valkey.url) as valkey,
            psycopg.connect(cluster.postgres.url) as postgres,
        ):
            (backends,) = postgres.execute("SELECT count(*) FROM pg_stat_activity").fetchone()
            return len(valkey.client_list()), backends

    with ExitStack() as stack:
        follower_that_does_not_read(cluster.url, path, stack).recv(1)
        before = connections()
        for sock in [follower_that_does_not_read(cluster.url, path, stack) for _ in range(300)]:
            sock.recv(1)
        after = connections()
    assert after[0] <= before[0] + 16  # the connections of one Redis client
    assert after[1] <= before[1] + 10  # the pool of the web process
    client.runs.cancel(thread_id, run["run_id"], wait=True)
