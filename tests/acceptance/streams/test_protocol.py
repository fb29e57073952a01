"""Version 2 of the streaming protocol: the SDK's `threads.stream`, and raw HTTP."""

from __future__ import annotations

import json
import uuid
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

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


def events_of(http, thread_id, channels=ALL, ends=1, **wanted):
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


def test_the_events_of_a_run_are_sent_from_its_start_to_its_end(http):
    thread_id = str(uuid.uuid4())  # run.start creates the thread
    run_id = start(http, thread_id, "counter", {"count": 1})
    events = events_of(http, thread_id)
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


def test_sequence_numbers_are_stable_and_since_continues_after_one(http, thread_id):
    for count in (1, 5):
        start(http, thread_id, "counter", {"count": count})
        events_of(http, thread_id, ends=1)
    events = events_of(http, thread_id, ends=2)
    numbers = [event["seq"] for event in events]
    assert numbers == sorted(set(numbers))
    assert max(numbers) < 2**53
    again = events_of(http, thread_id, ends=2)
    assert [(e["seq"], e["event_id"]) for e in again] == [(e["seq"], e["event_id"]) for e in events]
    rest = events_of(http, thread_id, ends=2, since=numbers[3])
    assert [event["seq"] for event in rest] == numbers[4:]
    fewer = events_of(http, thread_id, ["values"], ends=2)
    assert {event["seq"] for event in fewer} < set(numbers)


def test_frames_have_the_method_as_event_and_the_sequence_number_as_id(http, thread_id):
    start(http, thread_id, "counter", {"count": 1})
    with listening(http, thread_id) as listener:
        listener.until_ends()
        frames = listener.frames
    assert [frame.event for frame in frames] == [frame.data["method"] for frame in frames]
    assert [frame.id for frame in frames] == [str(frame.data["seq"]) for frame in frames]
    headers = listener.response.headers
    assert headers["content-type"].startswith("text/event-stream")
    assert headers["cache-control"] == "no-store"


def test_the_events_of_runs_of_the_other_api_are_sent(http, thread_id):
    wait_for(http, thread_id, "counter", {"count": 3}, stream_mode=["values"])
    events = events_of(http, thread_id)
    assert data_of(events, "values") == [{"count": 3}, {"count": 4}]
    assert is_end(events[-1], "completed")


def test_messages_are_streamed_in_content_blocks(http, thread_id):
    start(http, thread_id, "speaker", {"messages": "hello"})
    events = events_of(http, thread_id, ["messages"])
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


def test_a_message_that_was_not_streamed_is_sent_in_content_blocks(http, thread_id):
    start(http, thread_id, "chat", {"messages": "hi"})
    said = data_of(events_of(http, thread_id, ["messages"]), "messages")
    assert said[-2]["content"]["text"] == "echo: hi"
    assert said[-1]["event"] == "message-finish"


def test_the_start_and_the_output_of_a_tool_are_reported(http, thread_id):
    start(http, thread_id, "toolbox", {"messages": "21"})
    events = events_of(http, thread_id)
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


def test_the_error_of_a_tool_is_reported(http, thread_id):
    start(http, thread_id, "toolbox", {"messages": "-1"})
    events = events_of(http, thread_id)
    failed = data_of(events, "tools")[-1]
    assert failed["event"] == "tool-error"
    assert "below zero" in failed["message"]
    assert data_of(events, "lifecycle")[-1]["error"] == "no doubles below zero"


def test_a_named_custom_channel_has_only_events_of_that_name(http, thread_id):
    start(http, thread_id, "toolbox", {"messages": "4"})
    assert data_of(events_of(http, thread_id, ["custom:progress"]), "custom") != []
    assert data_of(events_of(http, thread_id, ["custom:other"]), "custom") == []


def test_custom_data_of_a_node_is_sent_as_payload(http, thread_id):
    start(http, thread_id, "teller", {"topic": "tea"})
    events = events_of(http, thread_id, ["custom"])
    assert data_of(events, "custom") == [{"payload": {"telling": "tea"}}]


def test_checkpoint_events_have_the_ids_of_the_history(http, thread_id):
    start(http, thread_id, "counter", {"count": 1})
    stored = data_of(events_of(http, thread_id, ["checkpoints"]), "checkpoints")
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


def test_a_subgraph_has_its_own_namespace_and_lifecycle(http, thread_id):
    start(http, thread_id, "family", {})
    events = events_of(http, thread_id)
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


def test_the_tree_of_a_run_has_its_subgraphs(http, thread_id):
    start(http, thread_id, "onion", {})
    events_of(http, thread_id)
    tree = command(http, thread_id, "agent.getTree", {})["result"]["tree"]
    assert (tree["namespace"], tree["status"], tree["graph_name"]) == ([], "interrupted", "onion")
    (outer,) = tree["children"]
    (inner,) = outer["children"]
    assert inner["namespace"][:1] == outer["namespace"]
    assert [outer["status"], inner["status"]] == ["interrupted", "interrupted"]
    assert outer["graph_name"] == outer["namespace"][0].partition(":")[0]
    assert "children" not in inner


def test_the_tree_of_a_running_run_shows_what_still_runs(http, thread_id):
    params = {"assistant_id": "family", "input": {"seconds": 30}}
    run_id = command(http, thread_id, "run.start", params)["result"]["run_id"]

    def tree():
        return command(http, thread_id, "agent.getTree", {})["result"]["tree"]

    shown = wait_until(lambda: (found := tree()).get("children") and found, 20, "the child")
    assert [shown["status"], shown["children"][0]["status"]] == ["running", "running"]
    path = f"/threads/{thread_id}/runs/{run_id}/cancel"
    http.post(path, params={"wait": "1"}).raise_for_status()
    assert tree()["children"][0]["status"] == "interrupted"


def test_the_namespace_of_a_subgraph_contains_its_task_id(http, thread_id):
    start(http, thread_id, "onion", {})
    events = events_of(http, thread_id)
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


def test_depth_excludes_deeper_namespaces(http, thread_id):
    start(http, thread_id, "family", {})
    events = events_of(http, thread_id, ["values"], namespaces=[[]], depth=0)
    assert data_of(events, "values")
    assert {tuple(event["params"]["namespace"]) for event in events} == {()}


def test_a_failed_run_is_reported_with_its_error(http, thread_id):
    start(http, thread_id, "bad", {"count": 1})
    end = events_of(http, thread_id)[-1]["params"]["data"]
    assert end == {"event": "failed", "graph_name": "bad", "error": "boom from bad node"}


@pytest.mark.parametrize("action", ["interrupt", "rollback"])
def test_a_cancelled_run_is_reported_as_interrupted(http, thread_id, action):
    run_id = start(http, thread_id, "steps", {"seconds": 30})
    with listening(http, thread_id) as listener:
        until_status(http, thread_id, run_id, "running")
        wait_until(lambda: data_of(listener.events, "tasks"), 20, "the first task")
        cancelled = http.post(
            f"/threads/{thread_id}/runs/{run_id}/cancel", params={"action": action, "wait": "true"}
        )
        assert cancelled.status_code == 200
        assert is_end(listener.until_ends()[-1], "interrupted")


def test_a_client_that_subscribes_before_the_first_run_gets_every_event(http):
    thread_id = str(uuid.uuid4())
    with listening(http, thread_id) as listener:
        for count in (1, 5):
            start(http, thread_id, "counter", {"count": count})
        live = listener.until_ends(2)
    assert [e["seq"] for e in live] == [e["seq"] for e in events_of(http, thread_id, ends=2)]


def test_the_event_stream_ends_when_its_thread_is_deleted(http, thread_id):
    with listening(http, thread_id) as listener:
        start(http, thread_id, "counter", {"count": 1})
        listener.until_ends()
        http.delete(f"/threads/{thread_id}").raise_for_status()
        listener._reader.join(10)
        assert not listener._reader.is_alive()


# --- interrupts -----------------------------------------------------------------------------


def interrupts_of(events):
    return data_of(events, "input.requested")


def test_an_interrupt_is_sent_once_and_resumed_by_its_id(http, thread_id):
    start(http, thread_id, "questions", {"topic": "tea"})
    events = events_of(http, thread_id)
    (asked,) = interrupts_of(events)
    assert asked["payload"] == asked["value"] == {"question": "first about tea?"}
    assert is_end(events[-1], "interrupted")
    assert all("__interrupt__" not in values for values in data_of(events, "values"))
    one = {"namespace": [], "interrupt_id": asked["interrupt_id"], "response": "green"}
    answer = command(http, thread_id, "input.respond", one, command_id=7)
    assert (answer["type"], answer["id"]) == ("success", 7)
    # The same again, before or after the run that answers it has ended.
    assert command(http, thread_id, "input.respond", one)["error"] == "no_such_interrupt"
    events = events_of(http, thread_id, ends=2)
    second = interrupts_of(events)[-1]
    assert second["payload"] == {"question": "second about tea?"}
    # If a thread waits for one answer, the next input is that answer.
    start(http, thread_id, "questions", "black")
    assert is_end(events_of(http, thread_id, ends=3)[-1], "completed")
    state = http.get(f"/threads/{thread_id}/state").json()
    assert state["values"]["answers"] == ["prepared", "green", "black", "worked"]


def test_several_interrupts_are_resumed_together(http, thread_id):
    start(http, thread_id, "panel", {})
    asked = interrupts_of(events_of(http, thread_id))
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
    events_of(http, thread_id, ends=2)
    log = http.get(f"/threads/{thread_id}/state").json()["values"]["log"]
    assert set(log) == {"cleo", "both", "ann:yes", "ben:yes", "close"}


def test_an_interrupt_of_a_subgraph_is_sent_once(http, thread_id):
    start(http, thread_id, "family", {"ask": True})
    events = events_of(http, thread_id)
    (asked,) = interrupts_of(events)
    assert asked["payload"] == "child asks"
    lives = [
        e["params"]["data"]["event"]
        for e in events
        if e["method"] == "lifecycle" and e["params"]["namespace"]
    ]
    assert lives == ["started", "interrupted"]


def test_a_response_to_an_unknown_interrupt_is_refused(http, thread_id):
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


def test_the_tree_has_the_status_of_the_latest_run(http, thread_id):
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
def test_the_multitask_strategy_may_be_written_in_either_case(http, thread_id, name):
    run_of(http, thread_id, "steps", {"seconds": 30})
    params = {"assistant_id": "counter", "input": {"count": 1}, name: "reject"}
    answer = command(http, thread_id, "run.start", params)
    assert answer["error"] == "unknown_error"
    assert answer["message"].startswith("409: Thread is already running a task.")


def test_run_start_passes_config_and_metadata_to_the_run(http, thread_id):
    config = {"configurable": {"by": 10}}
    run_id = start(http, thread_id, "counter", {"count": 1}, config=config, metadata={"a": "b"})
    assert data_of(events_of(http, thread_id), "values")[-1] == {"count": 11}
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
def test_a_failed_command_returns_an_error_envelope(
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
def test_a_malformed_command_is_400(http, thread_id, frame, command_id):
    answered = http.post(f"/threads/{thread_id}/commands", content=json.dumps(frame))
    assert answered.status_code == 400
    answer = answered.json()
    assert (answer["type"], answer["error"]) == ("error", "invalid_argument")
    assert answer["id"] == command_id


def test_a_body_with_invalid_json_is_400(http, thread_id):
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
def test_an_invalid_subscription_is_400(http, thread_id, body, detail):
    answered = http.post(f"/threads/{thread_id}/stream/events", json=body)
    assert refused(answered, 400).startswith(detail)


def test_a_malformed_thread_id_is_refused(http):
    frame = {"id": 1, "method": "agent.getTree"}
    assert http.post("/threads/x/commands", json=frame).status_code == 422
    assert http.post("/threads/x/stream/events", json={"channels": ["values"]}).status_code == 422


# --- the SDK's own session --------------------------------------------------------------------

TRANSPORTS = ["sse", "websocket"]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_sdk_session_resumes_interrupts(sync_client, transport):
    with sync_client.threads.stream(assistant_id="questions", transport=transport) as talk:
        talk.run.start(input={"topic": "tea"})
        for number, answer in enumerate(("green", "black"), start=1):
            wait_until(lambda n=number: len(talk.interrupts) == n, 20, "a question")
            asked = talk.interrupts[-1]
            assert asked["value"]["question"].endswith("about tea?")
            talk.run.respond(answer, interrupt_id=asked["interrupt_id"])
        assert talk.output["answers"] == ["prepared", "green", "black", "worked"]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_sdk_session_has_messages_tools_and_extensions(sync_client, transport):
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


def test_an_sdk_session_lists_subgraphs(sync_client):
    with sync_client.threads.stream(assistant_id="family") as talk:
        talk.run.start(input={})
        children = list(talk.subgraphs)
    assert [(child.graph_name, child.status) for child in children] == [("child", "completed")]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_async_sdk_session_streams_a_message_in_parts(make_client, transport):
    async def scene(client):
        async with client.threads.stream(assistant_id="speaker", transport=transport) as talk:
            await talk.run.start(input={"messages": "hello"})
            messages = [message async for message in talk.messages]
            return [[text async for text in message.text] for message in messages]

    (pieces,) = play(make_client, scene)
    assert len(pieces) > 1
    assert "".join(pieces) == "one two three"


def test_an_sdk_session_raises_the_error_of_a_failed_run(sync_client):
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


def send_command(socket, method, params=None, command_id=1):
    socket.send(json.dumps({"id": command_id, "method": method, "params": params or {}}))


def received(socket, wanted, timeout=20):
    """Return the messages up to the first that satisfies `wanted`."""
    messages = []
    while True:
        messages.append(json.loads(socket.recv(timeout)))
        if wanted(messages[-1]):
            return messages


def is_event_end(message):
    return message["type"] == "event" and is_end(message)


def is_response(message):
    return message["type"] != "event"


def test_a_websocket_accepts_commands_and_sends_their_events(http, server):
    thread_id = str(uuid.uuid4())
    with socket_of(server, thread_id) as socket:
        send_command(socket, "subscription.subscribe", {"channels": ALL}, 1)
        (subscribed,) = received(socket, is_response)
        assert subscribed["result"].pop("replayed_events") == 0
        assert list(subscribed["result"]) == ["subscription_id"]
        send_command(socket, "run.start", {"assistant_id": "counter", "input": {"count": 1}}, 2)
        messages = received(socket, is_event_end)
        assert [m["id"] for m in messages if is_response(m)] == [2]
        send_command(socket, "agent.getTree", {}, 3)
        assert received(socket, is_response)[-1]["result"]["tree"]["status"] == "completed"
        send_command(socket, "subscription.subscribe", {"channels": ALL}, 4)
        assert list(received(socket, is_response)[-1]["result"]) == ["subscription_id"]
    events = [message for message in messages if message["type"] == "event"]
    again = events_of(http, thread_id)
    assert [(e["seq"], e["params"]["data"]) for e in events] == [
        (e["seq"], e["params"]["data"]) for e in again
    ]


def test_a_websocket_can_unsubscribe_and_subscribe_again(http, server, thread_id):
    start(http, thread_id, "counter", {"count": 1})
    with socket_of(server, thread_id) as socket:
        send_command(socket, "subscription.subscribe", {"channels": ["lifecycle"]}, 1)
        messages = received(socket, is_event_end)
        name = next(m for m in messages if is_response(m))["result"]["subscription_id"]
        send_command(socket, "subscription.unsubscribe", {"subscription_id": name}, 2)
        assert received(socket, is_response)[-1] == {
            "type": "success",
            "id": 2,
            "result": {},
            "meta": {"applied_through_seq": 0},
        }
        send_command(socket, "subscription.unsubscribe", {"subscription_id": name}, 3)
        assert received(socket, is_response)[-1]["error"] == "no_such_subscription"
        since = messages[-1]["seq"]
        send_command(
            socket, "subscription.subscribe", {"channels": ["lifecycle"], "since": since}, 4
        )
        start(http, thread_id, "counter", {"count": 1})
        later = [m for m in received(socket, is_event_end) if m["type"] == "event"]
        assert all(event["seq"] > since for event in later)


def test_a_websocket_stays_open_after_an_invalid_message(server, thread_id):
    with socket_of(server, thread_id) as socket:
        for text in ("{", '"x"', "[" * 200 + "]" * 200, '{"id": 1}'):
            socket.send(text)
            (answer,) = received(socket, is_response)
            assert (answer["type"], answer["error"]) == ("error", "invalid_argument")
        send_command(socket, "subscription.subscribe", {"channels": ["bad"]}, 5)
        (answer,) = received(socket, is_response)
        assert answer["message"].startswith("channels contains unsupported entries: bad")
        send_command(socket, "agent.getTree", {}, 6)
        assert received(socket, is_response)[-1]["error"] == "no_such_run"


def test_a_large_event_is_sent_whole_over_a_websocket(http, server, thread_id):
    """Send an event larger than a socket's buffer to a slow reader."""
    note = "x" * 3_000_000
    start(http, thread_id, "counter", {"count": 1, "note": note})
    events_of(http, thread_id, ["lifecycle"])
    with socket_of(server, thread_id, max_size=None) as socket:
        send_command(socket, "subscription.subscribe", {"channels": ["values", "lifecycle"]}, 1)
        messages = received(socket, is_event_end)
    values = [m["params"]["data"] for m in messages if m.get("method") == "values"]
    assert [value["note"] for value in values] == [note, note]


def test_a_websocket_with_a_malformed_thread_id_is_refused(server):
    with pytest.raises(InvalidStatus) as refusal, socket_of(server, "nonsense"):
        pass
    assert refusal.value.response.status_code == 422


def test_closed_websockets_leave_no_listeners(http, server, thread_id):
    """Sessions of the SDK in earlier tests may still listen: on a busy machine, their threads read
    on for some seconds after the client was closed."""

    def listeners():
        lines = http.get("/metrics").text.splitlines()
        found = [line for line in lines if line.startswith("belay_listeners{")]
        return sum(float(line.rpartition(" ")[2]) for line in found)

    wait_until(lambda: listeners() < 5, 60, "most sessions to end")
    before = listeners()
    with ExitStack() as stack:
        for _ in range(5):
            socket = stack.enter_context(socket_of(server, thread_id))
            send_command(socket, "subscription.subscribe", {"channels": ["values"]}, 1)
            received(socket, is_response)
        wait_until(lambda: listeners() >= 5, 20, "five who listen")
    wait_until(lambda: listeners() <= before, 20, "no listener more than before")
