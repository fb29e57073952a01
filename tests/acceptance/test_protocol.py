"""Version 2 of the streaming protocol: the SDK's `threads.stream`, and raw HTTP."""

from __future__ import annotations

import json
import uuid
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from langchain_core.language_models.chat_model_stream import ChatModelStream
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from tests.acceptance.playing import (
    StreamReader,
    new_thread,
    play,
    refused,
    run_of,
    stops_all,
    until_status,
    wait_for,
)
from tests.waiting import wait_until

__all__ = ["stops_all"]

ALL = ["values", "updates", "messages", "tools", "custom", "lifecycle", "input", "tasks"]
TERMINAL = ("completed", "failed", "interrupted")


def command(http, thread_id, method, params=None, command_id=1):
    frame = {"id": command_id, "method": method, "params": params or {}}
    answered = http.post(f"/threads/{thread_id}/commands", json=frame)
    assert answered.status_code == 200, answered.text
    return answered.json()


def start(http, thread_id, graph, input=None, **params):
    asked = {"assistant_id": graph, "input": input, **params}
    answer = command(http, thread_id, "run.start", asked)
    assert answer["type"] == "success", answer
    return answer["result"]["run_id"]


def is_end(event, name=None):
    data = event["params"]["data"]
    ends = event["method"] == "lifecycle" and not event["params"]["namespace"]
    return ends and data["event"] in ((name,) if name else TERMINAL)


class Listener(StreamReader):
    """Reads a thread's events."""

    def __init__(self, http, thread_id, channels=ALL, **wanted):
        asked = {"channels": channels, **wanted}
        super().__init__(http, "POST", f"/threads/{thread_id}/stream/events", json=asked)

    @property
    def events(self):
        return [frame.data for frame in self.frames]

    def until_ends(self, count=1):
        wait_until(lambda: sum(map(is_end, self.events)) >= count, 20, f"{count} ends")
        return self.events


@contextmanager
def listening(http, thread_id, channels=ALL, **wanted) -> Iterator[Listener]:
    listener = Listener(http, thread_id, channels, **wanted)
    try:
        yield listener
    finally:
        listener.close()


def told(http, thread_id, channels=ALL, ends=1, **wanted):
    """Return the events of a thread up to the given number of ends."""
    channels = list(dict.fromkeys([*channels, "lifecycle"]))
    with listening(http, thread_id, channels, **wanted) as listener:
        return listener.until_ends(ends)


def by_method(events):
    found = defaultdict(list)
    for event in events:
        found[event["method"]].append(event["params"])
    return found


def data_of(events, method):
    return [params["data"] for params in by_method(events)[method]]


@pytest.fixture
def thread_id(http):
    return new_thread(http)


# --- events ---------------------------------------------------------------------------------


def test_a_run_is_told_from_its_start_to_its_end(http):
    thread_id = str(uuid.uuid4())  # run.start creates the thread
    run_id = start(http, thread_id, "counter", {"count": 1})
    events = told(http, thread_id)
    assert data_of(events, "lifecycle") == [
        {"event": "running", "graph_name": "counter"},
        {"event": "completed", "graph_name": "counter"},
    ]
    assert data_of(events, "values") == [{"count": 1}, {"count": 2}]
    assert data_of(events, "updates") == [{"node": "inc", "values": {"count": 2}}]
    begun, done = data_of(events, "tasks")
    assert (begun["name"], begun["input"]) == ("inc", {"count": 1})
    assert (done["id"], done["result"]) == (begun["id"], {"count": 2})
    assert all(event["type"] == "event" for event in events)
    assert all(event["params"]["namespace"] == [] for event in events)
    assert all(isinstance(event["params"]["timestamp"], int) for event in events)
    assert {event["event_id"].partition(":")[0] for event in events} == {run_id}


def test_every_reader_is_told_the_same_numbers_and_since_goes_on_behind_one(http, thread_id):
    for count in (1, 5):
        start(http, thread_id, "counter", {"count": count})
        told(http, thread_id, ends=1)
    events = told(http, thread_id, ends=2)
    numbers = [event["seq"] for event in events]
    assert numbers == sorted(set(numbers))
    assert max(numbers) < 2**53
    again = told(http, thread_id, ends=2)
    assert [(e["seq"], e["event_id"]) for e in again] == [(e["seq"], e["event_id"]) for e in events]
    rest = told(http, thread_id, ends=2, since=numbers[3])
    assert [event["seq"] for event in rest] == numbers[4:]
    fewer = told(http, thread_id, ["values"], ends=2)
    assert {event["seq"] for event in fewer} < set(numbers)


def test_frames_have_the_method_as_event_and_the_number_as_id(http, thread_id):
    start(http, thread_id, "counter", {"count": 1})
    with listening(http, thread_id) as listener:
        listener.until_ends()
        frames = listener.frames
    assert [frame.event for frame in frames] == [frame.data["method"] for frame in frames]
    assert [frame.id for frame in frames] == [str(frame.data["seq"]) for frame in frames]
    headers = listener.response.headers
    assert headers["content-type"].startswith("text/event-stream")
    assert headers["cache-control"] == "no-store"


def test_runs_of_the_other_api_are_told_too(http, thread_id):
    wait_for(http, thread_id, "counter", {"count": 3}, stream_mode=["values"])
    events = told(http, thread_id)
    assert data_of(events, "values") == [{"count": 3}, {"count": 4}]
    assert is_end(events[-1], "completed")


def test_messages_grow_by_blocks(http, thread_id):
    start(http, thread_id, "speaker", {"messages": "hello"})
    events = told(http, thread_id, ["messages"])
    said = data_of(events, "messages")
    assert [one["event"] for one in said[:2]] == ["message-start", "content-block-start"]
    assert [one["event"] for one in said[-2:]] == ["content-block-finish", "message-finish"]
    assert (said[0]["role"], said[0]["metadata"]["langgraph_node"]) == ("ai", "speak")
    deltas = [one["delta"] for one in said if one["event"] == "content-block-delta"]
    assert {delta["type"] for delta in deltas} == {"text-delta"}
    assert len(deltas) > 1
    assert "".join(delta["text"] for delta in deltas) == "one two three"
    assert said[-2]["content"] == {"type": "text", "text": "one two three"}
    stream = ChatModelStream(namespace=[], node="speak", message_id=said[0]["id"])
    for one in said:
        stream.dispatch(one)
    assert str(stream.text) == "one two three"


def test_a_message_that_comes_whole_is_told_in_blocks_too(http, thread_id):
    start(http, thread_id, "chat", {"messages": "hi"})
    said = data_of(told(http, thread_id, ["messages"]), "messages")
    assert said[-2]["content"]["text"] == "echo: hi"
    assert said[-1]["event"] == "message-finish"


def test_tools_say_when_they_start_and_what_they_answer(http, thread_id):
    start(http, thread_id, "toolbox", {"messages": "21"})
    events = told(http, thread_id)
    started, finished = data_of(events, "tools")
    assert (started["event"], started["tool_name"]) == ("tool-started", "double")
    assert started["tool_call_id"] == "call-21"
    assert finished["event"] == "tool-finished"
    assert finished["output"]["content"] == "42"
    blocks = [
        one["content"]
        for one in data_of(events, "messages")
        if one["event"] == "content-block-finish"
    ]
    calls = [block for block in blocks if block["type"] == "tool_call"]
    assert [(call["name"], call["args"]) for call in calls] == [("double", {"number": 21})]
    assert data_of(events, "custom") == [{"name": "progress", "payload": {"half": 21}}]


def test_a_tool_that_fails_says_so(http, thread_id):
    start(http, thread_id, "toolbox", {"messages": "-1"})
    events = told(http, thread_id)
    failed = data_of(events, "tools")[-1]
    assert failed["event"] == "tool-error"
    assert "below zero" in failed["message"]
    assert data_of(events, "lifecycle")[-1]["error"] == "no doubles below zero"


def test_a_named_custom_channel_has_only_what_carries_its_name(http, thread_id):
    start(http, thread_id, "toolbox", {"messages": "4"})
    assert data_of(told(http, thread_id, ["custom:progress"]), "custom") != []
    assert data_of(told(http, thread_id, ["custom:other"]), "custom") == []


def test_what_a_node_writes_is_a_payload(http, thread_id):
    start(http, thread_id, "teller", {"topic": "tea"})
    events = told(http, thread_id, ["custom"])
    assert data_of(events, "custom") == [{"payload": {"telling": "tea"}}]


def test_checkpoints_are_named(http, thread_id):
    start(http, thread_id, "counter", {"count": 1})
    stored = data_of(told(http, thread_id, ["checkpoints"]), "checkpoints")
    assert [(one["source"], one["step"]) for one in stored] == [
        ("input", -1),
        ("loop", 0),
        ("loop", 1),
    ]
    history = http.get(f"/threads/{thread_id}/history", params={"limit": 10}).json()
    assert [one["id"] for one in reversed(stored)] == [
        state["checkpoint"]["checkpoint_id"] for state in history
    ]
    assert stored[1]["parent_id"] == stored[0]["id"]


def test_a_subgraph_has_a_namespace_and_a_life_of_its_own(http, thread_id):
    start(http, thread_id, "family", {})
    events = told(http, thread_id)
    (child,) = {tuple(e["params"]["namespace"]) for e in events if e["params"]["namespace"]}
    assert child == ("child",)
    lives = [
        (e["params"]["data"]["event"], e["params"]["data"]["graph_name"])
        for e in events
        if e["method"] == "lifecycle" and e["params"]["namespace"] == list(child)
    ]
    assert lives == [("started", "child"), ("completed", "child")]
    wanted = [e["seq"] for e in events if e["method"] == "values" and e["params"]["namespace"]]
    with listening(http, thread_id, ["values"], namespaces=[["child"]]) as listener:
        wait_until(lambda: len(listener.events) >= len(wanted), 20, "the child's values")
        assert [e["seq"] for e in listener.events] == wanted


def test_a_subgraphs_namespace_names_the_task_it_is(http, thread_id):
    start(http, thread_id, "onion", {})
    events = told(http, thread_id)
    ids = {e["params"]["data"]["id"] for e in events if e["method"] == "tasks"}
    namespaces = {tuple(e["params"]["namespace"]) for e in events} - {()}
    assert max(map(len, namespaces)) == 2
    assert {part.partition(":")[2] for namespace in namespaces for part in namespace} <= ids
    ends = [
        (tuple(e["params"]["namespace"]), e["params"]["data"]["event"])
        for e in events
        if e["method"] == "lifecycle" and e["params"]["namespace"]
    ]
    assert {(n, event) for n in namespaces for event in ("started", "interrupted")} == set(ends)
    assert len(ends) == len(set(ends))


def test_depth_leaves_out_what_is_deeper(http, thread_id):
    start(http, thread_id, "family", {})
    events = told(http, thread_id, ["values"], namespaces=[[]], depth=0)
    assert data_of(events, "values")
    assert {tuple(event["params"]["namespace"]) for event in events} == {()}


def test_a_run_that_fails_is_told_with_its_error(http, thread_id):
    start(http, thread_id, "bad", {"count": 1})
    end = told(http, thread_id)[-1]["params"]["data"]
    assert end == {"event": "failed", "graph_name": "bad", "error": "boom from bad node"}


@pytest.mark.parametrize("action", ["interrupt", "rollback"])
def test_a_run_that_is_cancelled_is_told_as_interrupted(http, thread_id, action):
    run_id = start(http, thread_id, "steps", {"seconds": 30})
    with listening(http, thread_id) as listener:
        until_status(http, thread_id, run_id, "running")
        wait_until(lambda: data_of(listener.events, "tasks"), 20, "the first task")
        cancelled = http.post(
            f"/threads/{thread_id}/runs/{run_id}/cancel", params={"action": action, "wait": "true"}
        )
        assert cancelled.status_code == 200
        assert is_end(listener.until_ends()[-1], "interrupted")


def test_a_reader_that_is_there_first_misses_nothing(http):
    thread_id = str(uuid.uuid4())
    with listening(http, thread_id) as listener:
        for count in (1, 5):
            start(http, thread_id, "counter", {"count": count})
        live = listener.until_ends(2)
    assert [e["seq"] for e in live] == [e["seq"] for e in told(http, thread_id, ends=2)]


def test_the_stream_ends_with_its_thread(http, thread_id):
    with listening(http, thread_id) as listener:
        start(http, thread_id, "counter", {"count": 1})
        listener.until_ends()
        http.delete(f"/threads/{thread_id}").raise_for_status()
        listener._reader.join(10)
        assert not listener._reader.is_alive()


# --- interrupts -----------------------------------------------------------------------------


def questions(events):
    return data_of(events, "input.requested")


def test_a_question_is_told_once_and_answered_by_its_id(http, thread_id):
    start(http, thread_id, "questions", {"topic": "tea"})
    events = told(http, thread_id)
    (asked,) = questions(events)
    assert asked["payload"] == asked["value"] == {"question": "first about tea?"}
    assert is_end(events[-1], "interrupted")
    assert all("__interrupt__" not in values for values in data_of(events, "values"))
    one = {"namespace": [], "interrupt_id": asked["interrupt_id"], "response": "green"}
    answer = command(http, thread_id, "input.respond", one, command_id=7)
    assert (answer["type"], answer["id"]) == ("success", 7)
    events = told(http, thread_id, ends=2)
    second = questions(events)[-1]
    assert second["payload"] == {"question": "second about tea?"}
    # If a thread waits for one answer, the next input is that answer.
    start(http, thread_id, "questions", "black")
    assert is_end(told(http, thread_id, ends=3)[-1], "completed")
    state = http.get(f"/threads/{thread_id}/state").json()
    assert state["values"]["answers"] == ["prepared", "green", "black", "worked"]


def test_several_questions_are_answered_together(http, thread_id):
    start(http, thread_id, "panel", {})
    asked = questions(told(http, thread_id))
    assert sorted(one["payload"] for one in asked) == ["ann?", "ben?"]
    refusal = command(http, thread_id, "run.start", {"assistant_id": "panel", "input": "yes"})
    assert (refusal["type"], refusal["error"]) == ("error", "invalid_argument")
    answers = [
        {"namespace": [], "interrupt_id": one["interrupt_id"], "response": "yes"} for one in asked
    ]
    answer = command(
        http, thread_id, "input.respond", {"responses": answers, "update": {"log": ["both"]}}
    )
    assert answer["type"] == "success"
    told(http, thread_id, ends=2)
    log = http.get(f"/threads/{thread_id}/state").json()["values"]["log"]
    assert set(log) == {"cleo", "both", "ann:yes", "ben:yes", "close"}


def test_a_question_of_a_subgraph_is_told_once(http, thread_id):
    start(http, thread_id, "family", {"ask": True})
    events = told(http, thread_id)
    (asked,) = questions(events)
    assert asked["payload"] == "child asks"
    lives = [
        e["params"]["data"]["event"]
        for e in events
        if e["method"] == "lifecycle" and e["params"]["namespace"]
    ]
    assert lives == ["started", "interrupted"]


def test_an_answer_to_nothing_is_refused(http, thread_id):
    answer = command(
        http, thread_id, "input.respond", {"interrupt_id": "x", "response": 1, "namespace": []}
    )
    assert answer == {
        "type": "error",
        "id": 1,
        "error": "no_such_interrupt",
        "message": "Unknown or already-consumed interrupt: x",
    }


# --- commands -------------------------------------------------------------------------------


def test_the_tree_says_what_runs(http, thread_id):
    assert command(http, thread_id, "agent.getTree")["error"] == "no_such_run"
    run_id = start(http, thread_id, "steps", {"seconds": 30})
    until_status(http, thread_id, run_id, "running")
    tree = command(http, thread_id, "agent.getTree")["result"]["tree"]
    assert tree == {"namespace": [], "status": "running", "graph_name": "steps"}
    http.post(f"/threads/{thread_id}/runs/{run_id}/cancel", params={"wait": "1"})
    tree = command(http, thread_id, "agent.getTree")["result"]["tree"]
    assert tree["status"] == "interrupted"
    wait_for(http, thread_id, "counter", {"count": 1})
    assert command(http, thread_id, "agent.getTree")["result"]["tree"]["status"] == "completed"


@pytest.mark.parametrize("name", ["multitaskStrategy", "multitask_strategy"])
def test_a_strategy_may_be_written_both_ways(http, thread_id, name):
    run_of(http, thread_id, "steps", {"seconds": 30})
    params = {"assistant_id": "counter", "input": {"count": 1}, name: "reject"}
    answer = command(http, thread_id, "run.start", params)
    assert answer["error"] == "unknown_error"
    assert answer["message"].startswith("409: Thread is already running a task.")


def test_config_and_metadata_are_the_runs(http, thread_id):
    config = {"configurable": {"by": 10}}
    run_id = start(http, thread_id, "counter", {"count": 1}, config=config, metadata={"a": "b"})
    assert data_of(told(http, thread_id), "values")[-1] == {"count": 11}
    run = http.get(f"/threads/{thread_id}/runs/{run_id}").json()
    assert run["metadata"]["a"] == "b"


@pytest.mark.parametrize(
    ("method", "params", "error", "message"),
    [
        ("run.start", {}, "invalid_argument", "run.start requires an assistant_id."),
        ("run.start", {"assistant_id": 1}, "invalid_argument", "assistant_id: Not a valid string."),
        ("run.start", {"assistant_id": "none"}, "invalid_argument", "Invalid assistant: 'none'."),
        (
            "run.start",
            {"assistant_id": "00000000-0000-4000-8000-000000000000"},
            "unknown_error",
            "404: Thread or assistant not found.",
        ),
        ("input.respond", {}, "invalid_argument", "input.respond requires interrupt_id"),
        ("input.respond", {"responses": []}, "invalid_argument", "responses: Length must be"),
        ("state.get", {}, "unknown_command", "Unknown protocol command: state.get"),
        ("subscription.subscribe", {"channels": ["values"]}, "not_supported", "subscription.sub"),
    ],
)
def test_what_cannot_be_done_is_said_in_the_envelope(
    http, thread_id, method, params, error, message
):
    answer = command(http, thread_id, method, params, command_id=3)
    assert (answer["type"], answer["id"], answer["error"]) == ("error", 3, error)
    assert answer["message"].startswith(message)


@pytest.mark.parametrize(
    ("frame", "command_id"),
    [
        ({"method": "run.start"}, None),
        ({"id": "1", "method": "run.start"}, None),
        ({"id": True, "method": "run.start"}, None),
        ({"id": 4}, 4),
        ({"id": 4, "method": 4}, 4),
        ({"id": 4, "method": "run.start", "params": []}, 4),
        ([], None),
        ("x", None),
        (None, None),
    ],
    ids=str,
)
def test_what_is_no_command_is_a_400(http, thread_id, frame, command_id):
    answered = http.post(f"/threads/{thread_id}/commands", content=json.dumps(frame))
    assert answered.status_code == 400
    answer = answered.json()
    assert (answer["type"], answer["error"]) == ("error", "invalid_argument")
    assert answer["id"] == command_id


def test_what_is_no_json_is_a_400(http, thread_id):
    for path in ("commands", "stream/events"):
        answered = http.post(f"/threads/{thread_id}/{path}", content=b"{")
        assert refused(answered, 400) == "Invalid JSON body"


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        ({}, "channels is required and must be a non-empty array"),
        ([], "channels is required and must be a non-empty array"),
        ({"channels": []}, "channels is required and must be a non-empty array"),
        ({"channels": "values"}, "channels is required and must be a non-empty array"),
        (
            {"channels": ["bad"]},
            "channels contains unsupported entries: bad. Allowed: values, updates, messages, "
            "tools, custom, lifecycle, input, tasks, or any `custom:<name>`.",
        ),
        ({"channels": ["values"], "depth": -1}, "depth "),
        ({"channels": ["values"], "since": 2**60}, "since "),
        ({"channels": ["values"], "namespaces": ["a"]}, "namespaces.0 "),
    ],
    ids=str,
)
def test_what_cannot_be_streamed_is_a_400(http, thread_id, body, detail):
    answered = http.post(f"/threads/{thread_id}/stream/events", json=body)
    assert refused(answered, 400).startswith(detail)


def test_an_id_that_is_none_is_refused(http):
    frame = {"id": 1, "method": "agent.getTree"}
    assert http.post("/threads/x/commands", json=frame).status_code == 422
    assert http.post("/threads/x/stream/events", json={"channels": ["values"]}).status_code == 422


# --- the SDK's own session --------------------------------------------------------------------

TRANSPORTS = ["sse", "websocket"]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_session_answers_questions(sync_client, transport):
    with sync_client.threads.stream(assistant_id="questions", transport=transport) as talk:
        talk.run.start(input={"topic": "tea"})
        for number, answer in enumerate(("green", "black"), start=1):
            wait_until(lambda n=number: len(talk.interrupts) == n, 20, "a question")
            asked = talk.interrupts[-1]
            assert asked["value"]["question"].endswith("about tea?")
            talk.run.respond(answer, interrupt_id=asked["interrupt_id"])
        assert talk.output["answers"] == ["prepared", "green", "black", "worked"]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_session_has_messages_tools_and_extensions(sync_client, transport):
    with sync_client.threads.stream(assistant_id="toolbox", transport=transport) as talk:
        talk.run.start(input={"messages": "8"})
        seen = list(talk.interleave_projections(["messages", "tool_calls", "progress", "updates"]))
    kinds = defaultdict(list)
    for kind, item in seen:
        kinds[kind].append(item)
    assert "let me see" in [str(message.text) for message in kinds["messages"]]
    (call,) = kinds["tool_calls"]
    assert (call.name, call.output["content"]) == ("double", "16")
    assert kinds["progress"] == [{"name": "progress", "payload": {"half": 8}}]
    assert [update["node"] for update in kinds["updates"]] == ["call", "tools"]


def test_a_session_finds_subgraphs(sync_client):
    with sync_client.threads.stream(assistant_id="family") as talk:
        talk.run.start(input={})
        children = list(talk.subgraphs)
    assert [(child.graph_name, child.status) for child in children] == [("child", "completed")]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_async_session_streams_a_message_as_it_grows(make_client, transport):
    async def scene(client):
        async with client.threads.stream(assistant_id="speaker", transport=transport) as talk:
            await talk.run.start(input={"messages": "hello"})
            messages = [message async for message in talk.messages]
            return [[text async for text in message.text] for message in messages]

    (pieces,) = play(make_client, scene)
    assert len(pieces) > 1
    assert "".join(pieces) == "one two three"


def test_a_session_of_a_run_that_fails_raises(sync_client):
    with (
        sync_client.threads.stream(assistant_id="bad") as talk,
        pytest.raises(RuntimeError, match="boom from bad node"),
    ):
        talk.run.start(input={"count": 1})
        _ = talk.output


# --- on a WebSocket ---------------------------------------------------------------------------


@contextmanager
def socket_of(server, thread_id, **how):
    url = server.url.replace("http://", "ws://") + f"/threads/{thread_id}/stream/events"
    with connect(url, open_timeout=20, close_timeout=2, **how) as socket:
        yield socket


def ask(socket, method, params=None, command_id=1):
    socket.send(json.dumps({"id": command_id, "method": method, "params": params or {}}))


def heard(socket, wanted, timeout=20):
    """Return the messages up to the first that satisfies `wanted`."""
    messages = []
    while True:
        messages.append(json.loads(socket.recv(timeout)))
        if wanted(messages[-1]):
            return messages


def is_event_end(message):
    return message["type"] == "event" and is_end(message)


def is_answer(message):
    return message["type"] != "event"


def test_a_socket_takes_commands_and_tells_what_becomes_of_them(http, server):
    thread_id = str(uuid.uuid4())
    with socket_of(server, thread_id) as socket:
        ask(socket, "subscription.subscribe", {"channels": ALL}, 1)
        (subscribed,) = heard(socket, is_answer)
        assert subscribed["result"]["replayed_events"] == 0
        ask(socket, "run.start", {"assistant_id": "counter", "input": {"count": 1}}, 2)
        messages = heard(socket, is_event_end)
        assert [m["id"] for m in messages if is_answer(m)] == [2]
        ask(socket, "agent.getTree", {}, 3)
        assert heard(socket, is_answer)[-1]["result"]["tree"]["status"] == "completed"
    events = [message for message in messages if message["type"] == "event"]
    again = told(http, thread_id)
    assert [(e["seq"], e["params"]["data"]) for e in events] == [
        (e["seq"], e["params"]["data"]) for e in again
    ]


def test_a_socket_can_unsubscribe_and_subscribe_again(http, server, thread_id):
    start(http, thread_id, "counter", {"count": 1})
    with socket_of(server, thread_id) as socket:
        ask(socket, "subscription.subscribe", {"channels": ["lifecycle"]}, 1)
        messages = heard(socket, is_event_end)
        name = next(m for m in messages if is_answer(m))["result"]["subscription_id"]
        ask(socket, "subscription.unsubscribe", {"subscription_id": name}, 2)
        assert heard(socket, is_answer)[-1] == {
            "type": "success",
            "id": 2,
            "result": {},
            "meta": {"applied_through_seq": 0},
        }
        ask(socket, "subscription.unsubscribe", {"subscription_id": name}, 3)
        assert heard(socket, is_answer)[-1]["error"] == "no_such_subscription"
        since = messages[-1]["seq"]
        ask(socket, "subscription.subscribe", {"channels": ["lifecycle"], "since": since}, 4)
        start(http, thread_id, "counter", {"count": 1})
        later = [m for m in heard(socket, is_event_end) if m["type"] == "event"]
        assert all(event["seq"] > since for event in later)


def test_a_socket_says_what_is_wrong_and_stays(server, thread_id):
    with socket_of(server, thread_id) as socket:
        for text in ("{", '"x"', "[" * 200 + "]" * 200, '{"id": 1}'):
            socket.send(text)
            (answer,) = heard(socket, is_answer)
            assert (answer["type"], answer["error"]) == ("error", "invalid_argument")
        ask(socket, "subscription.subscribe", {"channels": ["bad"]}, 5)
        (answer,) = heard(socket, is_answer)
        assert answer["message"].startswith("channels contains unsupported entries: bad")
        ask(socket, "agent.getTree", {}, 6)
        assert heard(socket, is_answer)[-1]["error"] == "no_such_run"


def test_a_large_event_passes_a_socket_whole(http, server, thread_id):
    """Send an event larger than a socket's buffer to a slow reader."""
    note = "x" * 3_000_000
    start(http, thread_id, "counter", {"count": 1, "note": note})
    told(http, thread_id, ["lifecycle"])
    with socket_of(server, thread_id, max_size=None) as socket:
        ask(socket, "subscription.subscribe", {"channels": ["values", "lifecycle"]}, 1)
        messages = heard(socket, is_event_end)
    values = [m["params"]["data"] for m in messages if m.get("method") == "values"]
    assert [value["note"] for value in values] == [note, note]


def test_a_malformed_id_opens_no_socket(server):
    with pytest.raises(InvalidStatus) as refusal, socket_of(server, "nonsense"):
        pass
    assert refusal.value.response.status_code == 422


def test_a_socket_that_closes_leaves_nobody_listening(http, server, thread_id):
    def listeners():
        lines = http.get("/metrics").text.splitlines()
        found = [line for line in lines if line.startswith("belay_listeners{")]
        return sum(float(line.rpartition(" ")[2]) for line in found)

    wait_until(lambda: listeners() == 0, 20, "nobody to listen")
    with socket_of(server, thread_id) as socket:
        ask(socket, "subscription.subscribe", {"channels": ["values"]}, 1)
        heard(socket, is_answer)
        wait_until(lambda: listeners() == 1, 20, "one who listens")
    wait_until(lambda: listeners() == 0, 20, "nobody to listen again")
