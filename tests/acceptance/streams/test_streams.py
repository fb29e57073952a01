"""Streams of runs: headers, events and their payloads, and resuming after a disconnect."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from tests.acceptance.playing import (
    ALL_STEPS,
    Frame,
    frames_of,
    new_thread,
    play,
    refused,
    run_of,
    stops_all,
    stream,
    until_status,
    wait_for,
)

__all__ = ["stops_all"]

NO_EVENTS: list[Frame] = []


@pytest.fixture
def thread_id(http):
    return new_thread(http)


def streamed(http, thread_id, assistant, input_=None, **options) -> list[Frame]:
    """Return the frames of a new run without the first, which is always the same."""
    body = {"assistant_id": assistant, "input": input_, **options}
    _, frames = stream(http, "POST", f"/threads/{thread_id}/runs/stream", json=body)
    return without_metadata(http, thread_id, frames)


def without_metadata(http, thread_id, frames):
    run_id = http.get(f"/threads/{thread_id}/runs").json()[0]["run_id"]
    assert (frames[0].event, frames[0].data) == ("metadata", {"run_id": run_id, "attempt": 1})
    assert "metadata" not in [frame.event for frame in frames[1:]]
    return frames[1:]


def joined(http, thread_id, run_id, last_event_id=None, **params) -> list[Frame]:
    headers = {} if last_event_id is None else {"Last-Event-ID": last_event_id}
    path = f"/threads/{thread_id}/runs/{run_id}/stream"
    response, frames = stream(http, "GET", path, headers=headers, params=params)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    return frames


def events_of(frames):
    return [frame.event for frame in frames]


def data_of(frames):
    return [frame.data for frame in frames]


# --- the wire format ------------------------------------------------------------------------


def test_a_stream_has_the_documented_headers(http, thread_id):
    body = {"assistant_id": "counter", "input": {"count": 1}}
    response, _ = stream(http, "POST", f"/threads/{thread_id}/runs/stream", json=body)
    run_id = http.get(f"/threads/{thread_id}/runs").json()[0]["run_id"]
    own = f"/threads/{thread_id}/runs/{run_id}"
    expected = {
        "content-type": "text/event-stream; charset=utf-8",
        "cache-control": "no-store",
        "x-accel-buffering": "no",
        "transfer-encoding": "chunked",
        "location": f"{own}/stream",
        "content-location": own,
    }
    assert {name: response.headers.get(name) for name in expected} == expected


def test_an_event_has_an_id_only_if_its_run_is_resumable(http, thread_id):
    path = f"/threads/{thread_id}/runs/stream"
    body = {"assistant_id": "counter", "input": {"count": 1}}
    assert fields_of_events(http.post(path, json=body)) == [["event", "data"]] * 3
    body["stream_resumable"] = True
    assert fields_of_events(http.post(path, json=body)) == [["event", "data", "id"]] * 3


def fields_of_events(response):
    """Return the field names of each event in order, without heartbeats (comment lines)."""
    lines = [line for line in response.text.replace("\r\n", "\n").split("\n") if line[:1] != ":"]
    blocks = "\n".join(lines).strip().split("\n\n")
    return [[line.split(": ")[0] for line in block.split("\n")] for block in blocks]


def test_values_are_the_input_and_then_the_state_after_each_step(http, thread_id):
    assert streamed(http, thread_id, "counter", {"count": 1}) == [
        Frame("values", {"count": 1}),
        Frame("values", {"count": 2}),
    ]
    frames = streamed(http, thread_id, "steps", {"tag": ""}, stream_mode=[])
    assert set(events_of(frames)) == {"values"}
    steps = [data["steps"] for data in data_of(frames)]
    assert steps == [ALL_STEPS[:n] for n in (0, 1, 2, 3, 4)]


def test_values_are_only_the_output_of_a_graph(http, thread_id):
    frames = streamed(http, thread_id, "teller", {"topic": "tea"})
    assert frames[-1] == Frame("values", {"told": "plain tea"})
    assert all(data.keys() <= {"told"} for data in data_of(frames))


def test_updates_are_the_writes_of_each_node(http, thread_id):
    frames = streamed(http, thread_id, "steps", {}, stream_mode="updates")
    assert frames == [Frame("updates", {step: {"steps": [step]}}) for step in ALL_STEPS]


def test_custom_events_are_the_data_that_a_node_emits(http, thread_id):
    frames = streamed(http, thread_id, "teller", {"topic": "tea"}, stream_mode="custom")
    assert frames == [Frame("custom", {"telling": "tea"})]


def test_thousands_of_events_are_streamed_and_replayed_in_order(http, thread_id):
    body = {
        "assistant_id": "teller",
        "input": {"topic": "tea", "chatter": 3000},
        "stream_mode": "custom",
        "stream_resumable": True,
    }
    response, frames = stream(http, "POST", f"/threads/{thread_id}/runs/stream", json=body)
    assert data_of(frames[1:]) == [{"telling": "tea"}, *range(3000)]
    path = response.headers["location"]
    assert stream(http, "GET", path, headers={"Last-Event-ID": "-1"})[1] == frames
    middle = frames[1500]
    rest = stream(http, "GET", path, headers={"Last-Event-ID": middle.id})[1]
    assert rest == frames[1501:]


def test_several_modes_are_streamed_in_the_order_of_the_steps(http, thread_id):
    frames = streamed(
        http, thread_id, "teller", {"topic": "tea"}, stream_mode=["values", "updates", "custom"]
    )
    told = {"told": "plain tea"}
    tail = [
        Frame("custom", {"telling": "tea"}),
        Frame("updates", {"tell": {"draft": "not for others", **told}}),
        Frame("values", told),
    ]
    assert frames[-3:] == tail
    assert set(events_of(frames[:-3])) <= {"values"}


def test_partial_messages_grow_until_they_are_complete(http, thread_id):
    input_ = {"messages": [{"role": "user", "content": "hi"}]}
    frames = streamed(http, thread_id, "speaker", input_, stream_mode="messages")
    assert events_of(frames) == ["messages/metadata"] + ["messages/partial"] * (len(frames) - 1)
    (message_id,) = frames[0].data
    metadata = frames[0].data[message_id]["metadata"]
    assert (metadata["langgraph_node"], metadata["langgraph_step"]) == ("speak", 1)
    partials = [frame.data for frame in frames[1:]]
    assert {len(partial) for partial in partials} == {1}
    assert {(p["type"], p["id"]) for (p,) in partials} == {("ai", message_id)}
    texts = [p["content"] for (p,) in partials]
    assert texts[0] == "one"
    assert texts[-1] == "one two three"
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    state = http.get(f"/threads/{thread_id}/state").json()
    assert state["values"]["messages"][-1]["id"] == message_id
    assert state["values"]["messages"][-1]["content"] == "one two three"


def test_a_message_that_was_not_streamed_is_sent_complete(http, thread_id):
    input_ = {"messages": [{"role": "user", "content": "hi"}]}
    frames = streamed(http, thread_id, "chat", input_, stream_mode="messages")
    assert events_of(frames) == ["messages/metadata", "messages/complete"]
    (message,) = frames[1].data
    assert (message["type"], message["content"]) == ("ai", "echo: hi")
    assert list(frames[0].data) == [message["id"]]


def test_message_tuples_are_chunks_with_their_metadata(http, thread_id):
    input_ = {"messages": [{"role": "user", "content": "hi"}]}
    frames = streamed(http, thread_id, "speaker", input_, stream_mode="messages-tuple")
    assert set(events_of(frames)) == {"messages"}
    chunks = [chunk for chunk, _ in data_of(frames)]
    assert {chunk["type"] for chunk in chunks} == {"AIMessageChunk"}
    assert all(chunk["tool_call_chunks"] == [] for chunk in chunks)
    assert "".join(chunk["content"] for chunk in chunks) == "one two three"
    assert chunks[-1]["chunk_position"] == "last"
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {metadata["langgraph_node"] for _, metadata in data_of(frames)} == {"speak"}


def test_both_message_modes_keep_their_own_names(http, thread_id):
    input_ = {"messages": [{"role": "user", "content": "hi"}]}
    modes = ["messages", "messages-tuple"]
    frames = streamed(http, thread_id, "speaker", input_, stream_mode=modes)
    assert set(events_of(frames)) == {"messages", "messages/metadata", "messages/partial"}


def test_events_of_subgraphs_have_their_namespace(http, thread_id):
    modes = ["values", "updates", "custom"]
    frames = streamed(
        http, thread_id, "family", {"ask": False}, stream_mode=modes, stream_subgraphs=True
    )
    assert [f.data for f in frames if f.event == "custom|child"] == [{"from": "child"}]
    assert [f.data for f in frames if f.event == "updates|child"] == [
        {"child_one": {"log": ["c1"]}},
        {"child_two": {"log": ["c2"]}},
    ]
    child = [f.data["log"] for f in frames if f.event == "values|child"]
    assert child == [["p1"], ["p1", "c1"], ["p1", "c1", "c2"]]
    root = [f.data for f in frames if f.event == "updates"]
    assert [next(iter(update)) for update in root] == ["parent_one", "child", "parent_two"]
    assert set(events_of(frames)) == {
        *modes[:2],
        "values|child",
        "updates|child",
        "custom|child",
    }


def test_without_stream_subgraphs_only_the_root_is_streamed(http, thread_id):
    modes = ["values", "updates", "custom"]
    frames = streamed(http, thread_id, "family", {"ask": False}, stream_mode=modes)
    assert set(events_of(frames)) == {"values", "updates"}


def test_an_interrupt_is_the_last_event_of_the_stream(http, thread_id):
    modes = ["values", "updates"]
    frames = streamed(http, thread_id, "questions", {"topic": "tea"}, stream_mode=modes)
    interrupt_id = http.get(f"/threads/{thread_id}/state").json()["interrupts"][0]["id"]
    asked = [
        {
            "value": {"question": "first about tea?"},
            "id": interrupt_id,
            "response_schema": None,
        }
    ]
    values = [f.data for f in frames if f.event == "values"]
    assert values[-1] == {"topic": "tea", "answers": ["prepared"], "__interrupt__": asked}
    assert "__interrupt__" not in values[0]
    updates = [f.data for f in frames if f.event == "updates"]
    assert updates == [{"prepare": {"answers": ["prepared"]}}, {"__interrupt__": asked}]


def test_a_pause_by_interrupt_before_is_an_empty_interrupt(http, thread_id):
    frames = streamed(http, thread_id, "steps", {}, stream_mode="updates", interrupt_before=["s2"])
    assert data_of(frames) == [{"s1": {"steps": ["s1"]}}, {"__interrupt__": []}]


def test_an_error_is_the_last_event_of_the_stream(http, thread_id):
    frames = streamed(http, thread_id, "bad", {"count": 1})
    assert frames == [
        Frame("values", {"count": 1}),
        Frame("error", {"error": "ValueError", "message": "boom from bad node"}),
    ]


def test_a_timeout_is_an_error_event_at_the_end_of_the_stream(http, thread_id):
    frames = streamed(http, thread_id, "steps", {"seconds": 20}, timeout_seconds=0.3)
    assert frames[-1].event == "error"
    assert frames[-1].data["error"] == "TimeoutError"


@pytest.mark.parametrize("action", ["interrupt", "rollback"])
def test_a_cancelled_stream_ends_with_a_marker(make_client, thread_id, action):
    async def scene(client):
        events = []
        async for part in client.runs.stream(thread_id, "steps", input={"seconds": 20}):
            events.append(part.event)
            if part.event == "metadata":
                await client.runs.cancel(thread_id, part.data["run_id"], action=action)
        assert events[0] == "metadata"
        assert events[-1] == "end"
        assert set(events) <= {"metadata", "values", "end"}

    play(make_client, scene)


def test_a_stream_without_events_has_heartbeats(http, thread_id):
    body = {"assistant_id": "steps", "input": {"seconds": 0.35}, "stream_mode": "custom"}
    with http.stream("POST", f"/threads/{thread_id}/runs/stream", json=body) as response:
        lines = list(response.iter_lines())
    assert ": heartbeat" in lines
    assert events_of(frames_of(lines)) == ["metadata"]


def test_events_are_streamed_as_they_occur(http, thread_id, beats):
    body = {
        "assistant_id": "steps",
        "input": {"seconds": 0.5, "beats": str(beats)},
        "stream_mode": "updates",
    }
    seen = []
    with http.stream("POST", f"/threads/{thread_id}/runs/stream", json=body) as response:
        for line in response.iter_lines():
            if line.startswith('data: {"s1"'):
                seen = beats.names()
                break
    assert "s1:end" in seen
    assert "s2:end" not in seen


def test_the_sdk_clients_stream_to_the_end(make_client, sync_client, thread_id):
    created = []
    parts = list(
        sync_client.runs.stream(
            thread_id,
            "counter",
            input={"count": 1},
            stream_mode=["values", "updates"],
            on_run_created=created.append,
        )
    )
    assert [part.event for part in parts] == ["metadata", "values", "updates", "values"]
    assert parts[0].data["run_id"] == created[0]["run_id"]
    assert parts[2].data == {"inc": {"count": 2}}

    async def scene(client):
        parts = [
            part
            async for part in client.runs.stream(
                thread_id,
                "family",
                input={"ask": False},
                stream_mode=["custom"],
                stream_subgraphs=True,
                version="v2",
            )
        ]
        custom = [part for part in parts if part["type"] == "custom"]
        assert [(part["ns"], part["data"]) for part in custom] == [(["child"], {"from": "child"})]

    play(make_client, scene)


@pytest.mark.parametrize("mode", ["tools", "lifecycle", "nope"])
def test_an_unsupported_stream_mode_is_refused_and_creates_no_run(http, thread_id, mode):
    body = {"assistant_id": "counter", "input": {"count": 1}, "stream_mode": [mode]}
    detail = refused(http.post(f"/threads/{thread_id}/runs/stream", json=body), 422)
    assert mode in detail
    assert http.get(f"/threads/{thread_id}/runs").json() == []


# --- joining and resuming -------------------------------------------------------------------


def id_key(event_id):
    return tuple(int(part) for part in event_id.split("-"))


@pytest.fixture
def whole(http, thread_id):
    """Return all frames of a resumable run in two modes, as received by its creator."""
    body = {
        "assistant_id": "steps",
        "input": {"tag": ""},
        "stream_mode": ["values", "updates"],
        "stream_resumable": True,
    }
    _, frames = stream(http, "POST", f"/threads/{thread_id}/runs/stream", json=body)
    return frames


@pytest.fixture
def run_id(whole):
    return whole[0].data["run_id"]


def test_ids_are_strictly_increasing(whole):
    keys = [id_key(frame.id) for frame in whole]
    assert len(keys) == 10
    assert all(earlier < later for earlier, later in itertools.pairwise(keys))


def test_a_finished_resumable_run_is_replayed_from_the_start(
    http, make_client, sync_client, thread_id, whole, run_id
):
    for start in ("-1", "0"):
        assert joined(http, thread_id, run_id, start) == whole
    parts = list(sync_client.runs.join_stream(thread_id, run_id, last_event_id="-1"))
    expected = [(frame.event, frame.data, frame.id) for frame in whole]
    assert [(part.event, part.data, part.id) for part in parts] == expected

    async def scene(client):
        stream = client.runs.join_stream(thread_id, run_id, last_event_id="0")
        assert [(part.event, part.data, part.id) async for part in stream] == expected

    play(make_client, scene)


def test_a_resumed_stream_has_exactly_the_later_events(http, thread_id, whole, run_id):
    for position, frame in enumerate(whole):
        assert joined(http, thread_id, run_id, frame.id) == whole[position + 1 :]


def test_a_stream_resumed_after_its_end_has_no_events(http, thread_id, whole, run_id):
    assert joined(http, thread_id, run_id, whole[-1].id) == NO_EVENTS
    later = f"{id_key(whole[-1].id)[0]}-{id_key(whole[-1].id)[1] + 1000}"
    assert joined(http, thread_id, run_id, later) == NO_EVENTS
    assert joined(http, thread_id, run_id) == NO_EVENTS


def test_a_joined_stream_has_only_the_requested_modes(http, thread_id, whole, run_id):
    updates = [frame for frame in whole if frame.event == "updates"]
    assert joined(http, thread_id, run_id, "-1", stream_mode="updates") == updates
    assert joined(http, thread_id, run_id, "-1", stream_mode='["updates"]') == updates
    both = [frame for frame in whole if frame.event in ("updates", "values")]
    assert joined(http, thread_id, run_id, "-1", stream_mode=["updates", "values"]) == both


def test_a_run_that_is_not_resumable_is_not_replayed(http, thread_id):
    wait_for(http, thread_id, "counter", {"count": 1})
    run_id = http.get(f"/threads/{thread_id}/runs").json()[0]["run_id"]
    for last_event_id in (None, "-1", "0", "1-1"):
        assert joined(http, thread_id, run_id, last_event_id) == NO_EVENTS


def test_a_disconnected_stream_is_resumed_while_the_run_continues(http, thread_id):
    body = {
        "assistant_id": "steps",
        "input": {"seconds": 0.2},
        "stream_mode": ["values", "updates"],
        "stream_resumable": True,
    }
    lines = []
    with http.stream("POST", f"/threads/{thread_id}/runs/stream", json=body) as response:
        path = response.headers["location"]
        seen = ""
        for line in response.iter_lines():
            lines.append(line)
            seen = line.removeprefix("data: ") if line.startswith("data: ") else seen
            if not line and '"s1"' in seen:
                break
    before = frames_of(lines)
    assert before[-1].data in ({"s1": {"steps": ["s1"]}}, {"seconds": 0.2, "steps": ["s1"]})
    _, rest = stream(http, "GET", path, headers={"Last-Event-ID": before[-1].id})
    _, replay = stream(http, "GET", path, headers={"Last-Event-ID": "-1"})
    assert before + rest == replay
    assert len(replay) == 10


def test_a_running_resumable_run_is_replayed_from_the_start_and_then_live(
    http, thread_id, beats, stops_all
):
    input_ = {"seconds": 0.2, "beats": str(beats)}
    options = {"stream_mode": "updates", "stream_resumable": True}
    run_id = run_of(http, thread_id, "steps", input_, **options)
    beats.wait_for("s2:start")
    frames = joined(http, thread_id, run_id, "0")
    assert without_metadata(http, thread_id, frames) == [
        Frame("updates", {step: {"steps": [step]}}, frame.id)
        for step, frame in zip(ALL_STEPS, frames[1:], strict=True)
    ]


def test_joining_a_running_run_streams_only_later_events(http, thread_id, beats):
    input_ = {"seconds": 0.4, "beats": str(beats)}
    run_id = run_of(http, thread_id, "steps", input_, stream_mode="updates")
    # The update of s1 is sent by the time s2 starts; that of s2 is not sent before s2 ends.
    beats.wait_for("s2:beat", 3)
    frames = joined(http, thread_id, run_id)
    assert [next(iter(frame.data)) for frame in frames] == ["s2", "s3", "s4"]


def test_joining_a_pending_run_streams_all_its_events(
    make_client, http, thread_id, beats, stops_all
):
    first = run_of(http, thread_id, "steps", {"seconds": 20, "beats": str(beats)})
    second = run_of(http, thread_id, "counter", {"count": 1})
    beats.wait_for("s1:start")

    async def scene(client):
        async def follow():
            return [
                (part.event, part.data) async for part in client.runs.join_stream(thread_id, second)
            ]

        following = asyncio.create_task(follow())
        await client.runs.cancel(thread_id, first)
        return await asyncio.wait_for(following, 20)

    parts = play(make_client, scene)
    assert parts[0] == ("metadata", {"run_id": second, "attempt": 1})
    assert [event for event, _ in parts[1:]] == ["values", "values"]
    assert parts[-1][1]["count"] == 2


def test_joining_a_delayed_run_waits_for_it(sync_client, thread_id):
    run = sync_client.runs.create(thread_id, "counter", input={"count": 1}, after_seconds=1)
    parts = list(sync_client.runs.join_stream(thread_id, run["run_id"]))
    assert [(part.event, part.data) for part in parts] == [
        ("metadata", {"run_id": run["run_id"], "attempt": 1}),
        ("values", {"count": 1}),
        ("values", {"count": 2}),
    ]


def test_joining_an_ended_run_ends_at_once(http, sync_client, thread_id, stops_all):
    wait_for(http, thread_id, "bad", {"count": 1})
    cancelled = run_of(http, thread_id, "steps", {"seconds": 20})
    until_status(http, thread_id, cancelled, "running")
    sync_client.runs.cancel(thread_id, cancelled, wait=True)
    for run in sync_client.runs.list(thread_id):
        events = [p.event for p in sync_client.runs.join_stream(thread_id, run["run_id"])]
        assert events == (["end"] if run["run_id"] == cancelled else [])


def test_concurrent_readers_of_a_run_get_the_same_events(make_client, thread_id):
    async def scene(client):
        run = await client.runs.create(
            thread_id,
            "steps",
            input={"seconds": 0.1},
            stream_mode=["updates"],
            stream_resumable=True,
        )

        async def follow():
            parts = client.runs.join_stream(thread_id, run["run_id"], last_event_id="-1")
            return [(part.event, part.id) async for part in parts]

        seen = await asyncio.gather(follow(), follow(), follow())
        assert [event for event, _ in seen[0]] == ["metadata"] + ["updates"] * 4
        assert seen[0] == seen[1] == seen[2]

    play(make_client, scene)
