"""Streams of threads: one run after the other, resumed after a disconnect, until the deletion."""

from __future__ import annotations

import os
import signal
from contextlib import contextmanager

import httpx
import pytest

from tests.acceptance.playing import (
    StreamReader,
    new_thread,
    play,
    refused,
    stops_all,
    until_status,
)
from tests.conformance import watched
from tests.waiting import wait_until

__all__ = ["stops_all"]


@pytest.fixture
def thread_id(http):
    return new_thread(http)


class Listener(StreamReader):
    """Reads a thread's stream on its own connection."""

    def __init__(self, url, thread_id, last_event_id=None, **params):
        self._client = watched(httpx.Client(base_url=url, timeout=60))
        headers = {} if last_event_id is None else {"Last-Event-ID": last_event_id}
        path = f"/threads/{thread_id}/stream"
        super().__init__(self._client, "GET", path, params=params, headers=headers)

    def wait_for(self, count, what="frames"):
        wait_until(lambda: len(self.frames) >= count, 20, f"{count} {what}")
        return self.frames

    def close(self):
        super().close()
        self._client.close()


@contextmanager
def listening(server, thread_id, last_event_id=None, **params):
    listener = Listener(server.url, thread_id, last_event_id, **params)
    try:
        yield listener
    finally:
        listener.close()


def run(http, thread_id, assistant="counter", input_=None, **options):
    """Run a graph to its end and return the run's id."""
    body = {"assistant_id": assistant, "input": input_ or {"count": 1}, **options}
    made = http.post(f"/threads/{thread_id}/runs", json=body).json()
    http.get(f"/threads/{thread_id}/runs/{made['run_id']}/join")
    return made["run_id"]


def started(run_id):
    return ("metadata", {"run_id": run_id, "attempt": 1})


def done(run_id):
    return ("metadata", {"status": "run_done", "run_id": run_id})


def events_of(frames):
    return [(frame.event, frame.data) for frame in frames]


def test_a_thread_stream_has_the_events_and_the_end_of_every_run(server, http, thread_id):
    run(http, thread_id)  # before a client follows the thread
    with listening(server, thread_id) as listener:
        headers = listener.response.headers
        assert headers["content-type"] == "text/event-stream; charset=utf-8"
        assert headers["cache-control"] == "no-store"
        first = run(http, thread_id)
        second = run(http, thread_id, stream_mode=["updates"])
        frames = listener.wait_for(7)
        assert events_of(frames) == [
            started(first),
            ("values", {"count": 1}),
            ("values", {"count": 2}),
            done(first),
            started(second),
            ("updates", {"inc": {"count": 2}}),
            done(second),
        ]
        assert len({frame.id for frame in frames}) == len(frames)
        assert not listener.ended.is_set()


def test_a_thread_stream_may_be_limited_to_lifecycle_and_state_updates(server, http, thread_id):
    modes = {
        "lifecycle": {"stream_modes": "lifecycle"},
        "state": {"stream_modes": "state_update"},
        "both": {"stream_mode": ["lifecycle", "state_update"]},
        "listed": {"stream_modes": '["lifecycle","state_update"]'},
    }
    listeners = {name: Listener(server.url, thread_id, **asked) for name, asked in modes.items()}
    run_id = run(http, thread_id)
    http.post(f"/threads/{thread_id}/state", json={"values": {"count": 7}})
    try:
        lifecycle = [started(run_id), done(run_id)]
        assert events_of(listeners["lifecycle"].wait_for(2)) == lifecycle
        (update,) = listeners["state"].wait_for(1)
        assert update.event == "state_update"
        assert update.data["state"] == http.get(f"/threads/{thread_id}/state").json()
        assert update.data["state"]["values"] == {"count": 7}
        both = [*lifecycle, ("state_update", update.data)]
        assert events_of(listeners["both"].wait_for(3)) == both
        assert events_of(listeners["listed"].wait_for(3)) == both
    finally:
        for listener in listeners.values():
            listener.close()


@pytest.mark.parametrize("start", ["-", "0", "-1"])
def test_a_thread_stream_can_be_replayed_from_its_start(server, http, thread_id, start):
    run(http, thread_id)  # not to be replayed
    resumable = run(http, thread_id, stream_resumable=True)
    with listening(server, thread_id, start) as listener:
        frames = listener.wait_for(4)
        assert events_of(frames) == [
            started(resumable),
            ("values", {"count": 1}),
            ("values", {"count": 2}),
            done(resumable),
        ]
        last = run(http, thread_id)
        assert events_of(listener.wait_for(8))[4] == started(last)


def test_a_thread_stream_resumes_exactly_after_any_of_its_events(server, http, thread_id):
    for mode in ("values", "updates"):
        run(http, thread_id, "steps", {"tag": mode}, stream_mode=[mode], stream_resumable=True)
    http.post(f"/threads/{thread_id}/state", json={"values": {"tag": "x"}})
    everything = {"stream_modes": ["run_modes", "state_update"]}
    with listening(server, thread_id, "-", **everything) as listener:
        whole = listener.wait_for(2 + 5 + 2 + 4 + 1)
    assert [whole[-1].event, whole[-2].data["status"]] == ["state_update", "run_done"]
    for number, frame in enumerate(whole[:-1]):
        with listening(server, thread_id, frame.id, **everything) as listener:
            rest = listener.wait_for(len(whole) - number - 1)
        assert rest == whole[number + 1 :], frame


def attempts_in(frames):
    return [frame.data["attempt"] for frame in frames if "attempt" in frame.data]


def test_a_thread_stream_does_not_repeat_the_last_attempt_of_a_run(server, http, thread_id, beats):
    """Each attempt has an entry in the thread's log, the positions are of the first one."""
    input_ = {"beats": str(beats), "seconds": 0.3}
    body = {"assistant_id": "steps", "input": input_, "stream_resumable": True}
    run_id = http.post(f"/threads/{thread_id}/runs", json=body).json()["run_id"]
    beats.wait_for("s1:start")
    with listening(server, thread_id, "-") as listener:
        wait_until(lambda: attempts_in(listener.frames) == [1], 20, "the entry of the attempt")
        os.kill(beats.pids().pop(), signal.SIGKILL)
        wait_until(lambda: done(run_id) in events_of(listener.frames), 20, "the end")
        whole = listener.frames
    assert attempts_in(whole) == [1, 2]
    last = run(http, thread_id, stream_resumable=True)
    with listening(server, thread_id, whole[-1].id) as listener:
        assert events_of(listener.wait_for(1))[0] == started(last)


@pytest.mark.parametrize("resumable", [False, True])
def test_a_stream_says_that_a_killed_process_may_have_taken_events_with_it(
    http, thread_id, beats, resumable
):
    """Those of a resumable run were in the log before what they are about was stored."""
    input_ = {"beats": str(beats), "seconds": 0.3}
    body = {"assistant_id": "steps", "input": input_, "stream_resumable": resumable}
    lines = []
    with http.stream("POST", f"/threads/{thread_id}/runs/stream", json=body) as answer:
        for line in answer.iter_lines():
            lines.append(line)
            if len(lines) == 1:
                beats.wait_for("s1:start")
                os.kill(beats.pids().pop(), signal.SIGKILL)
    second = next(at for at, line in enumerate(lines) if '"attempt":2' in line)
    assert (": gap" in lines) is not resumable
    assert resumable or lines.index(": gap") < second


def test_joining_a_thread_during_a_run_streams_only_later_events(
    server, http, thread_id, beats, stops_all
):
    body = {"assistant_id": "steps", "input": {"seconds": 0.4, "beats": str(beats)}}
    run_id = http.post(f"/threads/{thread_id}/runs", json=body).json()["run_id"]
    beats.wait_for("s2:start")
    with listening(server, thread_id) as listener:
        wait_until(lambda: done(run_id) in events_of(listener.frames), 20, "the run's end")
        assert listener.frames[0].event == "values"
        assert len(listener.frames) < 6


def test_a_cancelled_run_is_reported_as_done(make_client, server, http, thread_id):
    async def scene(client):
        made = await client.runs.create(thread_id, "steps", input={"seconds": 20})
        with listening(server, thread_id, stream_modes="lifecycle") as listener:
            until_status(http, thread_id, made["run_id"], "running")
            await client.runs.cancel(thread_id, made["run_id"], action="rollback", wait=True)
            wait_until(lambda: done(made["run_id"]) in events_of(listener.frames), 20, "its end")

    play(make_client, scene)


def test_the_stream_of_a_deleted_thread_ends(server, http, thread_id):
    with listening(server, thread_id) as listener:
        http.delete(f"/threads/{thread_id}")
        assert listener.ended.wait(20)


def test_the_sdk_streams_a_thread(sync_client, http, thread_id):
    run_id = run(http, thread_id, stream_resumable=True)
    seen = []
    for part in sync_client.threads.join_stream(
        thread_id, last_event_id="-", stream_mode="lifecycle"
    ):
        seen.append((part.event, part.data))
        if len(seen) == 2:
            break
    assert seen == [started(run_id), done(run_id)]


@pytest.mark.parametrize(
    ("path", "headers", "status", "detail"),
    [
        ("/threads/00000000-0000-4000-8000-000000000000/stream", {}, 404, "not found"),
        ("/threads/nonsense/stream", {}, 422, "Invalid thread ID"),
        ("{thread}/stream?stream_modes=bad", {}, 422, "Invalid stream mode: bad"),
        ("{thread}/stream", {"Last-Event-ID": "garbage"}, 422, "Invalid Last-Event-ID"),
        ("{thread}/stream", {"Last-Event-ID": "1-2-3"}, 422, "Invalid Last-Event-ID"),
    ],
)
def test_an_invalid_thread_stream_request_is_refused(
    http, thread_id, path, headers, status, detail
):
    answer = http.get(path.format(thread=f"/threads/{thread_id}"), headers=headers)
    assert detail in refused(answer, status)
