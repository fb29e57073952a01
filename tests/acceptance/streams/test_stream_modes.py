"""The stream modes `events`, `debug`, `tasks` and `checkpoints`, alone and with all others."""

from __future__ import annotations

import pytest

from tests.acceptance.playing import Frame, new_thread, stream


@pytest.fixture
def thread_id(http):
    return new_thread(http)


def streamed(http, thread_id, assistant, input_, *modes, **options) -> list[Frame]:
    body = {"assistant_id": assistant, "input": input_, "stream_mode": list(modes), **options}
    path = f"/threads/{thread_id}/runs/stream" if thread_id else "/runs/stream"
    _, frames = stream(http, "POST", path, json=body)
    assert frames[0].event == "metadata"
    return frames[1:]


def data_of(frames, event):
    return [frame.data for frame in frames if frame.event == event]


def test_tasks_mode_sends_the_start_and_the_result_of_a_task(http, thread_id):
    frames = streamed(http, thread_id, "counter", {"count": 1}, "tasks")
    start, result = data_of(frames, "tasks")
    assert len(frames) == 2
    assert start.keys() == {"id", "name", "input", "triggers", "metadata"}
    assert (start["name"], start["input"]) == ("inc", {"count": 1})
    assert result == {
        "id": start["id"],
        "name": "inc",
        "error": None,
        "result": {"count": 2},
        "interrupts": [],
    }


def test_checkpoints_mode_sends_the_states_of_the_history(http, thread_id):
    frames = streamed(http, thread_id, "counter", {"count": 1}, "checkpoints")
    found = data_of(frames, "checkpoints")
    assert len(found) == len(frames) == 3
    fields = {"config", "parent_config", "values", "metadata", "next", "tasks"}
    assert {frozenset(checkpoint) for checkpoint in found} == {frozenset(fields)}
    history = http.get(f"/threads/{thread_id}/history?limit=10").json()[::-1]
    for checkpoint, state in zip(found, history, strict=True):
        checkpoint_id = checkpoint["config"]["configurable"]["checkpoint_id"]
        assert checkpoint_id == state["checkpoint_id"]
        assert checkpoint["values"] == state["values"]
        assert checkpoint["next"] == state["next"]
        assert checkpoint["metadata"]["step"] == state["metadata"]["step"]


def test_debug_mode_sends_checkpoints_and_tasks_with_their_steps(http, thread_id):
    frames = streamed(http, thread_id, "counter", {"count": 1}, "debug")
    found = data_of(frames, "debug")
    assert [(event["step"], event["type"]) for event in found] == [
        (-1, "checkpoint"),
        (0, "checkpoint"),
        (1, "task"),
        (1, "task_result"),
        (1, "checkpoint"),
    ]
    assert {frozenset(event) for event in found} == {
        frozenset({"step", "timestamp", "type", "payload"})
    }
    first, second = found[0]["payload"], found[1]["payload"]
    assert second["parent_checkpoint"] == first["checkpoint"]
    assert second["checkpoint"].keys() == {"checkpoint_id", "checkpoint_ns", "thread_id"}


def test_a_stateless_run_streams_no_checkpoints(http):
    frames = streamed(http, None, "counter", {"count": 1}, "debug", "checkpoints", "tasks")
    assert not data_of(frames, "checkpoints")
    assert [event["type"] for event in data_of(frames, "debug")] == ["task", "task_result"]
    assert len(data_of(frames, "tasks")) == 2


def test_events_mode_sends_the_events_of_graph_and_model(http, thread_id):
    question = {"messages": [{"role": "user", "content": "hi"}]}
    frames = streamed(http, thread_id, "speaker", question, "events")
    run_id = http.get(f"/threads/{thread_id}/runs").json()[0]["run_id"]
    events = data_of(frames, "events")
    assert len(events) == len(frames)
    assert events[0]["event"] == "on_chain_start"
    assert (events[0]["name"], events[0]["run_id"]) == ("speaker", run_id)
    assert events[0]["parent_ids"] == []
    assert (events[-1]["event"], events[-1]["run_id"]) == ("on_chain_end", run_id)
    kinds = [event["event"] for event in events]
    assert kinds.count("on_chat_model_start") == kinds.count("on_chat_model_end") == 1
    tokens = [
        event["data"]["chunk"]["content"]
        for event in events
        if event["event"] == "on_chat_model_stream"
    ]
    assert "".join(tokens) == "one two three"
    assert all(run_id in event["parent_ids"] for event in events[1:-1])


def test_events_mode_is_interleaved_with_the_other_modes(http, thread_id):
    frames = streamed(http, thread_id, "counter", {"count": 1}, "events", "values", "updates")
    assert [frame.event for frame in frames] == [
        "events",
        "values",
        *["events"] * 3,
        "updates",
        "values",
        "events",
    ]
    assert data_of(frames, "values") == [{"count": 1}, {"count": 2}]
    assert http.get(f"/threads/{thread_id}").json()["values"] == {"count": 2}


EVERY_MODE = [
    "values",
    "updates",
    "messages",
    "messages-tuple",
    "custom",
    "events",
    "debug",
    "tasks",
    "checkpoints",
]


def test_all_modes_together_cover_the_root_and_its_subgraphs(http, thread_id):
    frames = streamed(http, thread_id, "family", {}, *EVERY_MODE, stream_subgraphs=True)
    names = {frame.event for frame in frames}
    modes = {"values", "updates", "debug", "tasks", "checkpoints"}
    assert modes | {f"{mode}|child" for mode in modes} | {"custom|child", "events"} == names
    assert frames[-1].event == "events"
    log = http.get(f"/threads/{thread_id}").json()["values"]["log"]
    assert data_of(frames, "values")[-1]["log"] == log
    parent = next(
        task
        for event in data_of(frames, "debug")
        if event["type"] == "checkpoint"
        for task in event["payload"]["tasks"]
        if task["name"] == "child"
    )
    assert parent["checkpoint"]["checkpoint_ns"].startswith("child")


def test_all_modes_together_order_the_events_of_a_step_causally(http, thread_id):
    modes = ["values", "updates", "tasks", "debug", "checkpoints"]
    frames = streamed(http, thread_id, "counter", {"count": 1}, *modes)
    step = [
        (frame.event, frame.data.get("type")) if frame.event == "debug" else frame.event
        for frame in frames
    ]
    begun = step.index("tasks")
    assert step[begun:] == [
        "tasks",
        ("debug", "task"),
        "updates",
        "tasks",
        ("debug", "task_result"),
        "values",
        "checkpoints",
        ("debug", "checkpoint"),
    ]


def test_an_interrupt_is_streamed_with_the_result_of_its_task(http, thread_id):
    frames = streamed(http, thread_id, "questions", {"topic": "tea"}, "tasks", "debug", "events")
    (asked,) = data_of(frames, "tasks")[-1]["interrupts"]
    assert asked["value"]["question"] == "first about tea?"
    assert http.get(f"/threads/{thread_id}").json()["status"] == "interrupted"


@pytest.mark.parametrize("modes", [["tasks", "debug"], ["events"], EVERY_MODE])
def test_an_error_ends_the_stream_in_every_mode(http, thread_id, modes):
    frames = streamed(http, thread_id, "bad", {"count": 1}, *modes)
    assert frames[-1] == Frame(
        "error", {"error": "ValueError", "message": "boom from bad node"}, frames[-1].id
    )
    if "tasks" in modes:
        errors = [task.get("error") for task in data_of(frames, "tasks")]
        assert any("boom from bad node" in str(error) for error in errors)


def test_a_joined_stream_can_select_among_the_modes_of_its_run(http, thread_id):
    frames = streamed(
        http, thread_id, "counter", {"count": 1}, "tasks", "events", stream_resumable=True
    )
    run_id = http.get(f"/threads/{thread_id}/runs").json()[0]["run_id"]
    _, joined = stream(
        http,
        "GET",
        f"/threads/{thread_id}/runs/{run_id}/stream",
        headers={"Last-Event-ID": "-1"},
        params={"stream_mode": "tasks"},
    )
    assert joined == [frame for frame in frames if frame.event == "tasks"]


@pytest.mark.parametrize("mode", ["values", "events"])
def test_every_mode_has_the_same_recursion_limit(http, thread_id, mode):
    """LangChain's own would be 25 for events."""
    frames = streamed(http, thread_id, "track", {"goal": 30}, mode)
    assert "error" not in [frame.event for frame in frames], frames[-1]
    assert http.get(f"/threads/{thread_id}/state").json()["values"]["laps"] == 30
