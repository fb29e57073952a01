"""Features of LangGraph through the SDK: interrupts, commands, Send, subgraphs, deferred nodes,
caching, retries, durability, the recursion limit and time travel."""

from __future__ import annotations

import os
import signal
import uuid

import psutil
import pytest
from langgraph_sdk.errors import NotFoundError

from tests.acceptance.playing import ALL_STEPS, UNKNOWN, stops_all
from tests.waiting import wait_until

__all__ = ["stops_all"]

FIRST = {"question": "first about tea?"}
SECOND = {"question": "second about tea?"}
HOUSES = ("keeps", "inherits", "forgets")


@pytest.fixture
def thread_id(sync_client):
    return sync_client.threads.create()["thread_id"]


@pytest.fixture
def run(sync_client, thread_id):
    """Return a function that runs a graph on the thread and returns its values or error."""

    def run(assistant, input_=None, **options):
        return sync_client.runs.wait(
            thread_id, assistant, input=input_, raise_error=False, **options
        )

    return run


@pytest.fixture
def history(sync_client, thread_id):
    """Return a function that returns the thread's states, newest first."""

    def history(**where):
        return sync_client.threads.get_history(thread_id, limit=100, **where)

    return history


def streamed(sync_client, thread_id, assistant, input_=None, **options):
    """Return the names and data of a run's events, without the metadata event."""
    parts = sync_client.runs.stream(thread_id, assistant, input=input_, **options)
    first, *rest = [(part.event, part.data) for part in parts]
    assert first[0] == "metadata"
    return rest


def interrupt_ids_of(answer) -> dict:
    """Return the ids of the interrupts in a response to `wait`, by their values."""
    asked = answer.get("__interrupt__", [])
    return {question["value"]: question["id"] for question in asked}


def ids_of(states) -> list[str]:
    return [state["checkpoint_id"] for state in states]


def steps_of(states) -> list[int]:
    return [state["metadata"]["step"] for state in states]


def at_next(states, *nodes):
    """Return the newest of the states at which exactly these nodes are next."""
    return next(state for state in states if state["next"] == list(nodes))


# --- interrupts -----------------------------------------------------------------------------


def test_an_interrupt_is_returned_and_shown_on_the_thread(sync_client, thread_id, run):
    answer = run("questions", {"topic": "tea"})
    (question,) = answer["__interrupt__"]
    assert question == {"value": FIRST, "id": question["id"], "response_schema": None}
    assert answer["answers"] == ["prepared"]
    state = sync_client.threads.get_state(thread_id)
    (task,) = state["tasks"]
    stored = {"id": question["id"], "value": FIRST}
    assert (state["next"], state["interrupts"], task["interrupts"]) == (["ask"], [stored], [stored])
    thread = sync_client.threads.get(thread_id)
    assert (thread["status"], thread["interrupts"]) == ("interrupted", {task["id"]: [stored]})
    assert sync_client.runs.list(thread_id)[0]["status"] == "success"


def test_interrupts_in_sequence_are_raised_one_by_one(sync_client, thread_id, run):
    run("questions", {"topic": "tea"})
    (question,) = run("questions", command={"resume": "a"})["__interrupt__"]
    assert question["value"] == SECOND
    answer = run("questions", command={"resume": "b"})
    assert answer == {"topic": "tea", "answers": ["prepared", "a", "b", "worked"]}
    thread = sync_client.threads.get(thread_id)
    assert (thread["status"], thread["interrupts"]) == ("idle", {})


def test_interrupts_in_sequence_are_resumed_by_id(run):
    answer = run("questions", {"topic": "tea"})
    for said in ("a", "b"):
        (question,) = answer["__interrupt__"]
        answer = run("questions", command={"resume": {question["id"]: said}})
    assert answer["answers"] == ["prepared", "a", "b", "worked"]


@pytest.mark.parametrize("said", [0, [], {}, {"deep": [1, None, {"x": True}]}, "ä\n"], ids=repr)
def test_the_value_of_a_resume_by_id_may_be_any_json(run, said):
    (question,) = run("questions", {"topic": "tea"})["__interrupt__"]
    run("questions", command={"resume": {question["id"]: said}})
    assert run("questions", command={"resume": "b"})["answers"][1] == said


def test_all_interrupts_of_a_step_are_returned_together(sync_client, thread_id, run):
    answer = run("panel", {})
    asked = interrupt_ids_of(answer)
    assert answer["log"] == ["cleo"]
    assert asked.keys() == {"ann?", "ben?"}
    assert len(set(asked.values())) == 2
    state = sync_client.threads.get_state(thread_id)
    stored = {task["id"]: task["interrupts"] for task in state["tasks"] if task["interrupts"]}
    assert state["next"] == ["ann", "ben"]
    assert state["interrupts"] == [
        {"id": asked[value], "value": value} for value in ("ann?", "ben?")
    ]
    assert [q for questions in stored.values() for q in questions] == state["interrupts"]
    thread = sync_client.threads.get(thread_id)
    assert (thread["status"], thread["interrupts"]) == ("interrupted", stored)


def test_several_interrupts_are_resumed_together_by_their_ids(sync_client, thread_id, run, beats):
    asked = interrupt_ids_of(run("panel", {"beats": str(beats)}))
    resume = {asked["ben?"]: "no", asked["ann?"]: "yes"}
    answer = run("panel", command={"resume": resume})
    assert answer["log"] == ["ann:yes", "ben:no", "cleo", "close"]
    assert sync_client.threads.get(thread_id)["status"] == "idle"
    # The interrupted nodes ran again; the nodes that had ended did not.
    assert sorted(beats.names()) == ["ann", "ann", "ben", "ben", "cleo", "close"]


@pytest.mark.parametrize(("first", "then"), [("ann", "ben"), ("ben", "ann")])
def test_one_of_several_interrupts_is_resumed_by_its_id(
    sync_client, thread_id, run, beats, first, then
):
    asked = interrupt_ids_of(run("panel", {"beats": str(beats)}))
    answer = run("panel", command={"resume": {asked[f"{first}?"]: "yes"}})
    assert interrupt_ids_of(answer) == {f"{then}?": asked[f"{then}?"]}
    thread = sync_client.threads.get(thread_id)
    ((question,),) = thread["interrupts"].values()
    assert (thread["status"], question["value"]) == ("interrupted", f"{then}?")
    assert sync_client.threads.get_state(thread_id)["next"] == [then]
    # The last interrupt needs no id.
    answer = run("panel", command={"resume": "no"})
    assert sorted(answer["log"]) == sorted([f"{first}:yes", f"{then}:no", "cleo", "close"])
    assert beats.names().count(first) == 2
    assert beats.names().count("cleo") == beats.names().count("close") == 1


def test_one_resume_value_for_several_interrupts_fails_and_keeps_them(sync_client, thread_id, run):
    asked = interrupt_ids_of(run("panel", {}))
    error = run("panel", command={"resume": "yes"})["__error__"]
    assert error["error"] == "RuntimeError"
    assert "must specify the interrupt id" in error["message"]
    thread = sync_client.threads.get(thread_id)
    assert (thread["status"], thread["error"]) == ("error", error)
    assert len(thread["interrupts"]) == 2
    answer = run("panel", command={"resume": dict.fromkeys(asked.values(), "yes")})
    assert answer["log"] == ["ann:yes", "ben:yes", "cleo", "close"]


def test_a_resume_of_an_unknown_interrupt_has_no_effect(run):
    answer = run("questions", {"topic": "tea"})
    again = run("questions", command={"resume": {uuid.uuid4().hex: "a"}})
    assert again["__interrupt__"] == answer["__interrupt__"]


def test_a_strict_resume_of_an_unknown_interrupt_fails_without_effect(sync_client, thread_id):
    asked = sync_client.runs.wait(thread_id, "questions", input={"topic": "T"})

    def resume(interrupt_id, **options):
        command = {"resume": {interrupt_id: "an answer"}}
        run = sync_client.runs.create(thread_id, "questions", command=command, **options)
        return sync_client.runs.join(thread_id, run["run_id"])

    answer = resume("0" * 32, strict_resume=True)
    assert answer["__error__"]["error"] == "UnknownInterruptError"
    (waiting,) = sync_client.threads.get_state(thread_id)["interrupts"]
    assert waiting["id"] == asked["__interrupt__"][0]["id"]
    # Without strict_resume an unknown id is ignored; with it, a waiting interrupt's id is valid.
    assert resume("0" * 32)["__interrupt__"][0]["id"] == waiting["id"]
    (second,) = resume(waiting["id"], strict_resume=True)["__interrupt__"]
    assert "second" in second["value"]["question"]


def test_a_resume_by_id_may_include_an_update(run):
    (question,) = run("questions", {"topic": "tea"})["__interrupt__"]
    command = {"resume": {question["id"]: "a"}, "update": {"topic": "coffee"}}
    (question,) = run("questions", command=command)["__interrupt__"]
    assert question["value"] == {"question": "second about coffee?"}


def test_a_stream_includes_every_interrupt(sync_client, thread_id):
    modes = ["values", "updates"]
    parts = streamed(sync_client, thread_id, "panel", {}, stream_mode=modes)
    told = [
        question
        for event, data in parts
        if event == "updates"
        for question in data.get("__interrupt__", [])
    ]
    assert sorted(question["value"] for question in told) == ["ann?", "ben?"]
    shown = [
        question
        for event, data in parts
        if event == "values"
        for question in data.get("__interrupt__", [])
    ]
    assert shown == told
    resume = {question["id"]: "yes" for question in told}
    parts = streamed(sync_client, thread_id, "panel", command={"resume": resume})
    assert parts[-1] == ("values", {"log": ["ann:yes", "ben:yes", "cleo", "close"]})


def test_each_send_raises_its_own_interrupt(sync_client, thread_id, run):
    answer = run("squares", {"numbers": [3, 1, 2], "ask": True})
    asked = answer["__interrupt__"]
    ids = {question["value"]["number"]: question["id"] for question in asked}
    assert ids.keys() == {1, 2, 3}
    assert len(set(ids.values())) == 3
    assert len(sync_client.threads.get(thread_id)["interrupts"]) == 3
    answer = run("squares", command={"resume": {ids[3]: 5, ids[2]: 7}})
    assert [question["id"] for question in answer["__interrupt__"]] == [ids[1]]
    answer = run("squares", command={"resume": {ids[1]: 6}})
    assert (sorted(answer["squares"]), answer["total"]) == ([25, 36, 49], 110)


def test_wait_and_state_list_interrupts_in_the_order_of_their_sends(sync_client, thread_id, run):
    numbers = list(range(8))
    answer = run("squares", {"numbers": numbers, "ask": True})
    state = sync_client.threads.get_state(thread_id)
    for questions in (state["interrupts"], answer["__interrupt__"]):
        assert [question["value"]["number"] for question in questions] == numbers


# --- Send -----------------------------------------------------------------------------------


def test_each_send_runs_a_node_and_the_results_keep_their_order(history, run):
    answer = run("squares", {"numbers": [3, 1, 2]})
    assert (answer["squares"], answer["total"]) == ([9, 1, 4], 14)
    fanned = history()[2]
    assert fanned["next"] == ["square", "square", "square"]
    assert [task["result"] for task in fanned["tasks"]] == [{"squares": [n]} for n in (9, 1, 4)]
    assert {task["path"][0] for task in fanned["tasks"]} == {"__pregel_push"}
    assert len({task["id"] for task in fanned["tasks"]}) == 3


def test_without_sends_no_node_runs(run):
    assert run("squares", {"numbers": []}) == {"numbers": [], "squares": []}


def test_a_stream_includes_the_update_of_each_send(sync_client, thread_id):
    parts = streamed(
        sync_client, thread_id, "squares", {"numbers": [3, 1, 2]}, stream_mode="updates"
    )
    *each, last = [data for _, data in parts]
    assert sorted(data["square"]["squares"] for data in each) == [[1], [4], [9]]
    assert last == {"add_up": {"total": 14}}


@pytest.mark.parametrize(
    ("goto", "squares"),
    [
        ({"node": "square", "input": {"number": 5}}, [9, 25]),
        (
            [
                {"node": "square", "input": {"number": 5}},
                {"node": "square", "input": {"number": 6}},
            ],
            [9, 25, 36],
        ),
    ],
    ids=["one", "two"],
)
def test_the_command_of_a_client_may_send_input_to_a_node(run, goto, squares):
    run("squares", {"numbers": [3]})
    answer = run("squares", command={"goto": goto})
    assert (answer["squares"], answer["total"]) == (squares, sum(squares))


# --- commands -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("about", "log"),
    [
        ("sales", ["triage", "sales"]),
        ("repair", ["triage", "handed over", "sales"]),
        ("both", ["triage", "handed over", "sales", "sales"]),
    ],
)
def test_the_command_of_a_node_sets_goto_and_update(run, about, log):
    answer = run("desk", {"about": about})
    assert answer == {"about": about, "by": "triage", "log": log}


def test_a_node_may_go_to_the_end(sync_client, thread_id, run):
    assert run("desk", {}) == {"log": ["triage"]}
    assert sync_client.threads.get(thread_id)["status"] == "idle"


def test_the_command_of_a_client_sets_goto_and_update(run):
    run("desk", {"about": "sales"})
    answer = run("desk", command={"goto": "sales", "update": {"by": "client", "log": ["note"]}})
    assert (answer["by"], answer["log"]) == ("client", ["triage", "sales", "note", "sales"])


def test_the_command_of_a_client_may_go_to_several_nodes(run):
    run("desk", {"about": "sales"})
    answer = run("desk", command={"goto": ["sales", "repair"]})
    assert answer["log"] == ["triage", "sales", "handed over", "sales", "sales"]


def test_the_command_of_a_client_may_only_update(history, run):
    run("desk", {"about": "sales"})
    answer = run("desk", command={"update": {"log": ["note"]}})
    assert answer["log"] == ["triage", "sales", "note"]
    assert history()[0]["values"] == answer


# --- subgraphs ------------------------------------------------------------------------------


def test_the_memory_of_a_subgraph_depends_on_its_checkpointer(run):
    counts = [run("houses", {"name": name})["counts"] for name in ("ann", "ben", "cleo")]
    assert counts == [{"keeps": n, "inherits": 1, "forgets": 1} for n in (1, 2, 3)]


def test_a_subgraph_with_a_checkpointer_has_its_own_history(history, run, thread_id):
    for name in ("ann", "ben"):
        run("houses", {"name": name})
    states = history(checkpoint={"thread_id": thread_id, "checkpoint_ns": "keeps"})
    assert [state["values"].get("visits", []) for state in states] == [
        *[["ann", "ben"]] * 2,
        *[["ann"]] * 4,
        *[[]] * 2,
    ]
    assert {state["checkpoint"]["checkpoint_ns"] for state in states} == {"keeps"}
    assert steps_of(states) == [6, 5, 4, 3, 2, 1, 0, -1]
    assert [state["parent_checkpoint_id"] for state in states] == [*ids_of(states)[1:], None]


def test_the_memory_of_a_subgraph_is_separate_for_each_thread(sync_client, run):
    run("houses", {"name": "ann"})
    other = sync_client.threads.create()["thread_id"]
    answer = sync_client.runs.wait(other, "houses", input={"name": "ben"})
    assert answer["counts"]["keeps"] == 1


def nested_states(state) -> list[dict]:
    """Return the state and those of its subgraphs, outermost first."""
    states = [state]
    while state["tasks"] and state["tasks"][0]["state"]:
        state = state["tasks"][0]["state"]
        states.append(state)
    return states


def test_an_interrupt_in_a_nested_subgraph_shows_the_state_of_each_level(
    sync_client, thread_id, run
):
    answer = run("onion", {"log": []})
    (id_,) = interrupt_ids_of(answer).values()
    state = sync_client.threads.get_state(thread_id, subgraphs=True)
    states = nested_states(state)
    assert [(level["next"], level["values"]["log"]) for level in states] == [
        (["skin"], ["before_skin"]),
        (["core"], ["before_skin", "before_core"]),
        (["seed"], ["before_skin", "before_core"]),
    ]
    assert [level["interrupts"] for level in states] == [[{"id": id_, "value": "seed?"}]] * 3
    namespaces = [level["checkpoint"]["checkpoint_ns"] for level in states]
    skin, core = (
        f"{name}:{state['tasks'][0]['id']}"
        for name, state in zip(("skin", "core"), states, strict=False)
    )
    assert namespaces == ["", skin, f"{skin}|{core}"]
    maps = [level["checkpoint"].get("checkpoint_map") for level in states]
    ids = dict(zip(namespaces, ids_of(states), strict=True))
    assert maps[1:] == [dict(list(ids.items())[:n]) for n in (2, 3)]


def test_a_nested_state_is_read_by_its_checkpoint(sync_client, thread_id, run, history):
    run("onion", {"log": []})
    state = sync_client.threads.get_state(thread_id, subgraphs=True)
    for level in nested_states(state)[1:]:
        read = sync_client.threads.get_state(thread_id, checkpoint=level["checkpoint"])
        for field in ("values", "next", "checkpoint_id", "metadata", "interrupts"):
            assert read[field] == level[field]
        newest = history(checkpoint=level["checkpoint"])[0]
        assert (newest["checkpoint_id"], newest["values"]) == (
            level["checkpoint_id"],
            level["values"],
        )


def test_a_resume_reaches_the_innermost_subgraph(sync_client, thread_id, run):
    (id_,) = interrupt_ids_of(run("onion", {"log": []})).values()
    answer = run("onion", command={"resume": {id_: "yes"}})
    assert answer["log"] == ["before_skin", "before_core", "seed:yes", "after_core", "after_skin"]
    assert sync_client.threads.get(thread_id)["status"] == "idle"


def test_parallel_interrupted_subgraphs_are_resumed_one_by_one(sync_client, thread_id, run):
    asked = interrupt_ids_of(run("twins", {"log": []}))
    assert asked.keys() == {"eye?", "ear?"}
    state = sync_client.threads.get_state(thread_id, subgraphs=True)
    assert [(task["name"], task["state"]["next"]) for task in state["tasks"]] == [
        ("left", ["eye"]),
        ("right", ["ear"]),
    ]
    answer = run("twins", command={"resume": {asked["ear?"]: "yes"}})
    assert interrupt_ids_of(answer) == {"eye?": asked["eye?"]}
    (left, right) = sync_client.threads.get_state(thread_id, subgraphs=True)["tasks"]
    assert left["state"]["next"] == ["eye"]
    assert right["result"] == {"log": ["ear:yes"]}
    answer = run("twins", command={"resume": {asked["eye?"]: "no"}})
    assert answer["log"] == ["eye:no", "ear:yes"]


def test_a_stream_includes_the_updates_of_each_level(sync_client, thread_id):
    options = {"stream_mode": "updates", "stream_subgraphs": True}
    parts = streamed(sync_client, thread_id, "onion", {"log": []}, **options)
    told = {
        node: [part.partition(":")[0] for part in event.split("|")]
        for event, data in parts
        for node in data
        if node != "__interrupt__"
    }
    assert told == {"before_skin": ["updates"], "before_core": ["updates", "skin"]}
    parts = streamed(sync_client, thread_id, "onion", command={"resume": "yes"}, **options)
    assert [(event.count("|"), *data) for event, data in parts] == [
        (2, "seed"),
        (1, "core"),
        (1, "after_core"),
        (0, "skin"),
        (0, "after_skin"),
    ]


def test_the_state_of_an_interrupted_subgraph_can_be_updated(sync_client, thread_id, run):
    run("family", {"ask": True})
    (task,) = sync_client.threads.get_state(thread_id, subgraphs=True)["tasks"]
    child = task["state"]["checkpoint"]
    saved = sync_client.threads.update_state(thread_id, {"log": ["mine"]}, checkpoint=child)
    assert saved["checkpoint"]["checkpoint_ns"] == child["checkpoint_ns"]
    (task,) = sync_client.threads.get_state(thread_id, subgraphs=True)["tasks"]
    assert task["state"]["values"]["log"] == ["p1", "c1", "mine"]
    thread = sync_client.threads.get(thread_id)
    assert (thread["status"], thread["values"]["log"]) == ("interrupted", ["p1"])
    answer = run("family", command={"resume": "yes"})
    assert answer["log"] == ["p1", "p1", "c1", "mine", "c2:yes", "p2"]


def test_a_thread_whose_subgraph_pauses_is_interrupted(sync_client, thread_id, run):
    """The subgraph was compiled with `interrupt_before`, so its run has no interrupts."""
    run("paused", {})
    assert sync_client.threads.get_state(thread_id)["next"] == ["child"]
    assert sync_client.threads.get(thread_id)["status"] == "interrupted"
    assert run("paused")["log"] == ["c1"]
    assert sync_client.threads.get(thread_id)["status"] == "idle"


# --- deferred nodes -------------------------------------------------------------------------


def test_a_deferred_node_waits_for_every_branch(run):
    answer = run("patient_relay", {"log": []})
    assert answer["log"] == ["long", "short", "longer", "finish"]


def test_a_node_that_is_not_deferred_runs_after_each_branch(run):
    answer = run("hasty_relay", {"log": []})
    assert answer["log"] == ["long", "short", "finish", "longer", "finish"]


def test_a_deferred_node_is_next_only_at_the_end(history, run):
    run("patient_relay", {"log": []})
    nexts = [state["next"] for state in history()]
    assert nexts == [[], ["finish"], ["longer"], ["short", "long"], ["__start__"]]


# --- caching --------------------------------------------------------------------------------


def test_a_cached_node_runs_once_for_the_same_input(run, beats):
    tea, milk = (f"{name}-{uuid.uuid4()}" for name in ("tea", "milk"))
    words = [tea, milk, tea, tea, milk]
    answer = run("dictionary", {"words": words, "beats": str(beats)})
    assert answer["meanings"] == [f"meaning of {word}" for word in words]
    assert beats.names() == [tea, milk]


def test_processes_share_a_cache_in_redis(sync_client, beats):
    """The process that looked the word up is killed before the second run."""
    words = [f"tea-{uuid.uuid4()}"]
    wanted = {"words": words, "beats": str(beats)}
    first = sync_client.runs.wait(None, "shared_dictionary", input=wanted)
    (pid,) = beats.pids()
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not psutil.pid_exists(pid), 30, "the end of the process")
    assert sync_client.runs.wait(None, "shared_dictionary", input=wanted) == first
    assert beats.names() == words


def test_messages_are_trimmed_to_a_window(sync_client, thread_id):
    for word in ("one", "two", "three"):
        said = {"messages": [{"role": "user", "content": word}]}
        values = sync_client.runs.wait(thread_id, "forgetful", input=said)
    assert values["messages"][-1]["content"] == "two one one two three"
    assert len(values["messages"]) == 6


def test_a_stream_marks_results_from_the_cache(sync_client, thread_id):
    input_ = {"words": [f"tea-{uuid.uuid4()}"] * 3}
    parts = streamed(sync_client, thread_id, "dictionary", input_, stream_mode="updates")
    found = [data for _, data in parts if "look_up" in data]
    assert [data.get("__metadata__") for data in found] == [
        None,
        {"cached": True},
        {"cached": True},
    ]
    assert found[0]["look_up"] == found[1]["look_up"] == found[2]["look_up"]


# --- retries --------------------------------------------------------------------------------


def test_a_node_is_retried_until_it_succeeds(sync_client, thread_id, run, beats):
    answer = run("stubborn", {"beats": str(beats), "failures": 2, "kind": "connection"})
    assert answer["log"] == ["try 3", "rest"]
    assert beats.names() == ["try", "try", "try", "rest"]
    # All tries were in one attempt of the run.
    state = sync_client.threads.get_state(thread_id)
    assert (state["metadata"]["run_attempt"], state["metadata"]["step"]) == (1, 2)


def test_a_node_that_fails_on_every_try_fails_its_run(sync_client, thread_id, run, beats):
    answer = run("stubborn", {"beats": str(beats), "failures": 3, "kind": "connection"})
    assert answer == {"__error__": {"error": "ConnectionError", "message": "failure 3"}}
    assert beats.names() == ["try"] * 3
    assert sync_client.runs.list(thread_id)[0]["status"] == "error"
    assert sync_client.threads.get(thread_id)["status"] == "error"
    state = sync_client.threads.get_state(thread_id)
    assert state["next"] == ["try"]
    assert state["tasks"][0]["error"] == "ConnectionError('failure 3')"


def test_a_permanent_error_is_not_retried(run, beats):
    answer = run("stubborn", {"beats": str(beats), "failures": 1, "kind": "value"})
    assert answer == {"__error__": {"error": "ValueError", "message": "failure 1"}}
    assert beats.names() == ["try"]


def test_a_new_run_continues_with_the_failed_node(sync_client, thread_id, run, beats):
    run("stubborn", {"beats": str(beats), "failures": 3, "kind": "connection"})
    assert run("stubborn")["log"] == ["try 4", "rest"]
    thread = sync_client.threads.get(thread_id)
    assert (thread["status"], thread["error"]) == ("idle", None)


# --- durability -----------------------------------------------------------------------------


@pytest.fixture
def gate(tmp_path):
    return tmp_path / "gate"


@pytest.fixture
def at_the_gate(sync_client, thread_id, beats, gate, stops_all):
    """Return a function that starts a run, waits for its third step, and returns the run's id."""

    def start(**options):
        input_ = {"beats": str(beats), "gate": str(gate)}
        run = sync_client.runs.create(thread_id, "gated", input=input_, **options)
        beats.wait_for("s3")
        return run["run_id"]

    return start


def steps_now(sync_client, thread_id):
    return sync_client.threads.get_state(thread_id)["values"].get("steps")


def test_sync_durability_stores_a_step_before_the_next_one_begins(
    sync_client, thread_id, at_the_gate
):
    at_the_gate(durability="sync")
    state = sync_client.threads.get_state(thread_id)
    assert (state["values"]["steps"], state["next"]) == (["s1", "s2"], ["s3"])


@pytest.mark.parametrize("options", [{"durability": "async"}, {}], ids=["async", "default"])
def test_async_durability_stores_a_step_while_the_next_one_runs(
    sync_client, thread_id, at_the_gate, options
):
    at_the_gate(**options)
    wait_until(lambda: steps_now(sync_client, thread_id) == ["s1", "s2"])
    assert sync_client.runs.list(thread_id)[0]["kwargs"]["durability"] == "async"


def test_exit_durability_stores_nothing_before_the_end(
    sync_client, thread_id, history, at_the_gate, gate
):
    run_id = at_the_gate(durability="exit")
    assert history() == []
    gate.touch()
    assert sync_client.runs.join(thread_id, run_id)["steps"] == ALL_STEPS
    (state,) = history()
    assert (state["values"]["steps"], state["next"]) == (ALL_STEPS, [])
    assert (state["metadata"]["step"], state["parent_checkpoint_id"]) == (4, None)


@pytest.mark.parametrize(
    ("durability", "steps"),
    [("sync", [4, 3, 2, 1, 0, -1]), ("async", [4, 3, 2, 1, 0, -1]), ("exit", [4])],
)
def test_durability_determines_how_many_checkpoints_are_kept(run, history, gate, durability, steps):
    gate.touch()
    answer = run("gated", {"gate": str(gate)}, durability=durability)
    assert answer["steps"] == ALL_STEPS
    assert steps_of(history()) == steps


@pytest.mark.parametrize("durability", ["sync", "async", "exit"])
def test_a_cancelled_run_is_continued_from_its_last_step(
    sync_client, thread_id, run, beats, gate, at_the_gate, durability
):
    run_id = at_the_gate(durability=durability)
    wait_until(lambda: durability != "async" or steps_now(sync_client, thread_id) == ["s1", "s2"])
    sync_client.runs.cancel(thread_id, run_id, wait=True)
    state = sync_client.threads.get_state(thread_id)
    assert (state["values"]["steps"], state["next"]) == (["s1", "s2"], ["s3"])
    gate.touch()
    assert run("gated")["steps"] == ALL_STEPS
    assert beats.names() == ["s1", "s2", "s3", "s3", "s4"]


@pytest.mark.parametrize("durability", ["sync", "async", "exit"])
def test_a_failed_run_is_continued_from_its_last_step(
    sync_client, thread_id, run, beats, gate, durability
):
    gate.touch()
    input_ = {"beats": str(beats), "gate": str(gate), "fails": True}
    answer = run("gated", input_, durability=durability)
    assert answer == {"__error__": {"error": "ValueError", "message": "closed"}}
    state = sync_client.threads.get_state(thread_id)
    assert (state["values"]["steps"], state["next"]) == (["s1", "s2"], ["s3"])
    assert state["tasks"][0]["error"] == "ValueError('closed')"
    sync_client.threads.update_state(thread_id, {"fails": False}, as_node="s2")
    assert run("gated", durability=durability)["steps"] == ALL_STEPS
    assert beats.names() == ["s1", "s2", "s3", "s3", "s4"]


@pytest.mark.parametrize("durability", ["sync", "async", "exit"])
@pytest.mark.parametrize(
    ("assistant", "log"),
    [
        ("panel", ["ann:yes", "ben:yes", "cleo", "close"]),
        ("onion", ["before_skin", "before_core", "seed:yes", "after_core", "after_skin"]),
    ],
)
def test_interrupts_are_resumed_under_every_durability(
    sync_client, thread_id, run, assistant, log, durability
):
    asked = interrupt_ids_of(run(assistant, {"log": []}, durability=durability))
    assert sync_client.threads.get(thread_id)["status"] == "interrupted"
    resume = dict.fromkeys(asked.values(), "yes")
    answer = run(assistant, command={"resume": resume}, durability=durability)
    assert answer["log"] == log
    assert sync_client.threads.get_state(thread_id)["values"] == answer


def test_exit_durability_adds_one_checkpoint_for_each_run(run, history):
    for n in (1, 2, 3):
        run("steps", {"tag": ""}, durability="exit")
        assert len(history()) == n
    states = history()
    assert [len(state["values"]["steps"]) for state in states] == [12, 8, 4]
    assert [state["parent_checkpoint_id"] for state in states] == [*ids_of(states)[1:], None]


# --- recursion limit ------------------------------------------------------------------------


def test_the_recursion_limit_ends_a_run_with_its_own_error(sync_client, thread_id, run):
    answer = run("track", {"goal": 50}, config={"recursion_limit": 10})
    error = answer["__error__"]
    assert list(answer) == ["__error__"]
    assert error["error"] == "GraphRecursionError"
    assert error["message"].startswith("Recursion limit of 10 reached without hitting a stop")
    (found,) = sync_client.runs.list(thread_id)
    assert found["status"] == "error"
    assert sync_client.runs.join(thread_id, found["run_id"]) == answer
    thread = sync_client.threads.get(thread_id)
    assert (thread["status"], thread["error"]) == ("error", error)
    assert (thread["values"]["laps"], thread["interrupts"]) == (10, {})


def test_the_sdk_raises_the_error_of_the_recursion_limit(sync_client, thread_id):
    with pytest.raises(Exception, match="GraphRecursionError: Recursion limit of 3 reached"):
        sync_client.runs.wait(thread_id, "track", input={"goal": 50}, config={"recursion_limit": 3})


def test_a_stream_ends_with_the_error_of_the_recursion_limit(sync_client, thread_id):
    config = {"recursion_limit": 3}
    parts = streamed(sync_client, thread_id, "track", {"goal": 50}, config=config)
    *before, (event, error) = parts
    assert [data["laps"] for _, data in before] == [0, 1, 2, 3]
    assert (event, error["error"]) == ("error", "GraphRecursionError")


def test_a_run_is_continued_after_its_recursion_limit(sync_client, thread_id, run):
    run("track", {"goal": 15}, config={"recursion_limit": 10})
    assert sync_client.threads.get_state(thread_id)["next"] == ["lap"]
    assert run("track", config={"recursion_limit": 10}) == {"goal": 15, "laps": 15}
    assert sync_client.threads.get(thread_id)["status"] == "idle"


def test_a_graph_can_stop_before_its_recursion_limit(run):
    answer = run("track", {"goal": 50, "heeds": True}, config={"recursion_limit": 10})
    assert answer == {"goal": 50, "heeds": True, "laps": 9}


def test_a_run_overrides_the_recursion_limit_of_its_assistant(sync_client, thread_id, run):
    limited = sync_client.assistants.create("track", config={"recursion_limit": 4})
    error = run(limited["assistant_id"], {"goal": 6})["__error__"]
    assert error["message"].startswith("Recursion limit of 4 reached")
    other = sync_client.threads.create()["thread_id"]
    answer = sync_client.runs.wait(
        other, limited["assistant_id"], input={"goal": 6}, config={"recursion_limit": 7}
    )
    assert answer["laps"] == 6


def test_a_run_without_a_recursion_limit_can_take_many_steps(run):
    assert run("track", {"goal": 60})["laps"] == 60


# --- time travel ----------------------------------------------------------------------------


@pytest.mark.parametrize("done", range(5))
def test_a_replay_runs_only_what_came_after_the_checkpoint(run, history, beats, done):
    run("steps", {"beats": str(beats)})
    old = history()[4 - done]
    before = len(beats.lines())
    answer = run("steps", checkpoint=old["checkpoint"])
    assert answer["steps"] == ALL_STEPS
    replayed = [name for name in beats.names()[before:] if name.endswith(":start")]
    assert replayed == [f"{step}:start" for step in ALL_STEPS[done:]]


def lineage(states) -> list[dict]:
    """Return the newest state and its ancestors, newest first."""
    by_id = {state["checkpoint_id"]: state for state in states}
    line = [states[0]]
    while line[-1]["parent_checkpoint_id"]:
        line.append(by_id[line[-1]["parent_checkpoint_id"]])
    return line


def test_a_replay_creates_a_branch_and_keeps_the_old_one(sync_client, thread_id, run, history):
    run("steps", {"tag": ""})
    before = history()
    old = before[2]
    run("steps", checkpoint=old["checkpoint"])
    after = history()
    assert after[-len(before) :] == before
    line = lineage(after)
    assert line[-len(before) + 2 :] == before[2:]
    assert [state["metadata"]["source"] for state in line[:3]] == ["loop", "loop", "fork"]
    assert [state["next"] for state in line[:3]] == [[], ["s4"], ["s3"]]
    assert len(after) == len(before) + 3
    replay = sync_client.runs.list(thread_id)[0]["run_id"]
    assert {state["metadata"]["run_id"] for state in line[:3]} == {replay}


def test_a_fork_continues_from_an_updated_old_state(sync_client, thread_id, run, history):
    first = run("steps", {"tag": ""})
    before = history()
    old = at_next(before, "s3")
    fork = sync_client.threads.update_state(
        thread_id, {"steps": ["fork"]}, checkpoint=old["checkpoint"]
    )
    answer = run("steps", checkpoint=fork["checkpoint"])
    assert answer["steps"] == ["s1", "s2", "fork", "s3", "s4"]
    line = lineage(history())
    assert ids_of(line)[2:4] == [fork["checkpoint_id"], old["checkpoint_id"]]
    assert line[2]["metadata"]["source"] == "update"
    # The other branch can still be read and continued.
    other = sync_client.threads.get_state(thread_id, checkpoint=before[0]["checkpoint"])
    assert other["values"] == first
    assert run("steps", {"tag": ""}, checkpoint=other["checkpoint"])["steps"] == ALL_STEPS * 2


def test_a_run_without_a_checkpoint_continues_the_newest_fork(sync_client, thread_id, run, history):
    run("steps", {"tag": ""})
    old = at_next(history(), "s2")
    sync_client.threads.update_state(
        thread_id, {"steps": ["skip"]}, checkpoint=old["checkpoint"], as_node="s3"
    )
    assert sync_client.threads.get(thread_id)["status"] == "interrupted"
    assert run("steps")["steps"] == ["s1", "skip", "s4"]
    assert sync_client.threads.get(thread_id)["status"] == "idle"


def test_two_forks_of_one_checkpoint_are_independent(sync_client, thread_id, run, history):
    run("steps", {"tag": ""})
    old = at_next(history(), "s4")
    forks = [
        sync_client.threads.update_state(thread_id, {"steps": [word]}, checkpoint=old["checkpoint"])
        for word in ("left", "right")
    ]
    for fork, word in zip(forks, ("left", "right"), strict=True):
        answer = run("steps", checkpoint=fork["checkpoint"])
        assert answer["steps"] == ["s1", "s2", "s3", word, "s4"]


def test_new_input_at_an_old_checkpoint_restarts_the_graph_from_it(run, history):
    run("steps", {"tag": ""})
    old = at_next(history(), "s2")
    answer = run("steps", {"tag": "x"}, checkpoint=old["checkpoint"])
    assert answer == {"tag": "x", "steps": ["s1", *ALL_STEPS]}


def test_a_command_at_an_old_checkpoint_continues_from_it(run, history):
    run("steps", {"tag": ""})
    old = at_next(history(), "s2")
    command = {"goto": "s4", "update": {"steps": ["jump"]}}
    answer = run("steps", command=command, checkpoint=old["checkpoint"])
    # The node that was next there runs too.
    assert answer["steps"] == ["s1", "jump", "s2", "s4", "s3", "s4"]


def test_a_replay_raises_an_earlier_interrupt_again(sync_client, thread_id, run, history):
    run("questions", {"topic": "tea"})
    for said in ("a", "b"):
        run("questions", command={"resume": said})
    old = at_next(history(), "ask")
    answer = run("questions", checkpoint=old["checkpoint"])
    assert [question["value"] for question in answer["__interrupt__"]] == [FIRST]
    assert sync_client.threads.get(thread_id)["status"] == "interrupted"
    for said in ("c", "d"):
        answer = run("questions", command={"resume": said})
    assert answer["answers"] == ["prepared", "c", "d", "worked"]


def test_an_earlier_interrupt_may_be_resumed_with_another_value(run, history):
    asked = interrupt_ids_of(run("panel", {}))
    yes = run("panel", command={"resume": dict.fromkeys(asked.values(), "yes")})
    old = at_next(history(), "ann", "ben", "cleo")
    again = interrupt_ids_of(run("panel", checkpoint=old["checkpoint"]))
    no = run("panel", command={"resume": dict.fromkeys(again.values(), "no")})
    assert yes["log"] == ["ann:yes", "ben:yes", "cleo", "close"]
    assert no["log"] == ["ann:no", "ben:no", "cleo", "close"]
    assert [state["values"]["log"] for state in history() if not state["next"]] == [
        no["log"],
        yes["log"],
    ]


def test_a_fork_with_a_changed_state_raises_another_interrupt(sync_client, thread_id, run, history):
    run("questions", {"topic": "tea"})
    for said in ("a", "b"):
        run("questions", command={"resume": said})
    old = at_next(history(), "ask")
    sync_client.threads.update_state(thread_id, {"topic": "milk"}, checkpoint=old["checkpoint"])
    (question,) = run("questions")["__interrupt__"]
    assert question["value"] == {"question": "first about milk?"}
    run("questions", command={"resume": "c"})
    answer = run("questions", command={"resume": "d"})
    assert answer == {"topic": "milk", "answers": ["prepared", "c", "d", "worked"]}


def test_a_replay_repeats_the_sends_of_its_checkpoint(sync_client, thread_id, run, history):
    run("squares", {"numbers": [3, 1, 2]})
    old = at_next(history(), "square", "square", "square")
    answer = run("squares", checkpoint=old["checkpoint"])
    assert (answer["squares"], answer["total"]) == ([9, 1, 4], 14)


def test_a_replay_raises_an_earlier_interrupt_of_a_subgraph_again(run, history):
    run("onion", {"log": []})
    run("onion", command={"resume": "yes"})
    old = at_next(history(), "skin")
    assert list(interrupt_ids_of(run("onion", checkpoint=old["checkpoint"]))) == ["seed?"]
    answer = run("onion", command={"resume": "no"})
    assert answer["log"] == ["before_skin", "before_core", "seed:no", "after_core", "after_skin"]


@pytest.fixture
def old_skin(sync_client, thread_id, run, history):
    """Return the outer subgraph's checkpoint before its first node, on a thread that has ended."""
    run("onion", {"log": []})
    (task,) = sync_client.threads.get_state(thread_id)["tasks"]
    states = history(checkpoint=task["checkpoint"])
    run("onion", command={"resume": "yes"})
    return at_next(states, "before_core")["checkpoint"]


def test_a_run_continues_from_an_old_checkpoint_of_a_subgraph(
    sync_client, thread_id, run, old_skin
):
    options = {"stream_mode": "updates", "stream_subgraphs": True}
    parts = streamed(sync_client, thread_id, "onion", checkpoint=old_skin, **options)
    assert [(event.count("|"), *data) for event, data in parts] == [
        (1, "before_core"),
        *[(level, "__interrupt__") for level in (2, 1, 0)],
    ]
    answer = run("onion", command={"resume": "no"})
    assert answer["log"] == ["before_skin", "before_core", "seed:no", "after_core", "after_skin"]


def test_a_fork_of_a_subgraph_returns_a_checkpoint_to_continue_from(
    sync_client, thread_id, run, old_skin
):
    saved = sync_client.threads.update_state(thread_id, {"log": ["mine"]}, checkpoint=old_skin)
    assert saved["checkpoint"]["checkpoint_ns"] == old_skin["checkpoint_ns"]
    answer = run("onion", checkpoint=saved["checkpoint"])
    assert list(interrupt_ids_of(answer)) == ["seed?"]


def test_an_unknown_checkpoint_is_not_found(sync_client, thread_id, run):
    run("steps", {"tag": ""})
    before = sync_client.threads.get_state(thread_id)
    unknown = {"thread_id": thread_id, "checkpoint_ns": "", "checkpoint_id": UNKNOWN}
    with pytest.raises(NotFoundError):
        sync_client.runs.create(thread_id, "steps", checkpoint=unknown)
    with pytest.raises(NotFoundError):
        sync_client.threads.update_state(thread_id, {"steps": ["x"]}, checkpoint=unknown)
    assert sync_client.threads.get_state(thread_id) == before
    assert len(sync_client.runs.list(thread_id)) == 1


# --- without a thread -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("assistant", "input_", "end"),
    [
        ("squares", {"numbers": [2, 3]}, {"numbers": [2, 3], "squares": [4, 9], "total": 13}),
        (
            "desk",
            {"about": "sales"},
            {"about": "sales", "by": "triage", "log": ["triage", "sales"]},
        ),
        ("houses", {"name": "a"}, {"name": "a", "counts": dict.fromkeys(HOUSES, 1)}),
        ("patient_relay", {}, {"log": ["long", "short", "longer", "finish"]}),
        ("track", {"goal": 5}, {"goal": 5, "laps": 5}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_stateless_run_supports_sends_commands_and_subgraphs(sync_client, assistant, input_, end):
    assert sync_client.runs.wait(None, assistant, input=input_) == end


def test_a_stateless_run_returns_its_interrupts(sync_client):
    answer = sync_client.runs.wait(None, "panel", input={})
    assert (answer["log"], interrupt_ids_of(answer).keys()) == (["cleo"], {"ann?", "ben?"})


# --- the functional API ---------------------------------------------------------------------------


def test_an_entrypoint_continues_from_what_its_last_run_saved(run):
    assert run("ledger", {"count": 2}) == {"total": 2, "answer": "unasked"}
    assert run("ledger", {"count": 3}) == {"total": 5, "answer": "unasked"}


def test_a_resumed_entrypoint_does_not_repeat_its_tasks(run, beats):
    asked = run("ledger", {"count": 3, "asks": True, "beats": str(beats)})
    assert [question["value"] for question in asked["__interrupt__"]] == [{"total": 3}]
    assert run("ledger", command={"resume": "yes"}) == {"total": 3, "answer": "yes"}
    assert beats.names() == ["add0", "add1", "add2"]


@pytest.mark.parametrize("action", ["interrupt", "rollback"])
def test_a_cancelled_entrypoint_stops_within_its_task(sync_client, thread_id, run, beats, action):
    assert run("ledger", {"count": 1})["total"] == 1
    given = {"count": 3, "beats": str(beats), "seconds": 600}
    started = sync_client.runs.create(thread_id, "ledger", input=given)
    beats.wait_for("add1")
    sync_client.runs.cancel(thread_id, started["run_id"], wait=True, action=action)
    assert beats.names() == ["add1"]
    assert run("ledger", {"count": 1})["total"] == 2


# --- user interfaces ------------------------------------------------------------------------------


def test_a_component_for_a_user_interface_is_streamed_and_kept(sync_client, thread_id):
    events = streamed(sync_client, thread_id, "drawer", {}, stream_mode=["custom", "values"])
    (pushed,) = [data for name, data in events if name == "custom"]
    assert pushed["type"] == "ui"
    assert (pushed["name"], pushed["props"], pushed["id"]) == (
        "chart",
        {"points": [1, 2]},
        "chart-1",
    )
    assert pushed["metadata"]["message_id"] == "said"
    values = sync_client.threads.get_state(thread_id)["values"]
    assert values["ui"] == [pushed]
    assert [message["content"] for message in values["messages"]] == ["here is a chart"]
