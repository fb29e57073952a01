"""Projects of the shapes that public ones have, with LangChain's agents and a stand-in model.

`docs/reference/projects.md` has the real projects that these were rebuilt from.
"""

from __future__ import annotations

import asyncio
import json
import re
import uuid
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from langgraph_sdk import get_client, get_sync_client

from tests.conformance import watched
from tests.model_server import model_server
from tests.waiting import wait_until

pytestmark = pytest.mark.long
PROJECTS = Path(__file__).parents[2] / "projects"


@pytest.fixture(scope="module")
def model():
    with model_server() as server:
        yield server


@pytest.fixture(scope="module")
def make_project(make_server, model):
    """A function that starts a project with the stand-in for its models."""
    with ExitStack() as stack:

        def start(name):
            config = PROJECTS / name / "langgraph.json"
            server = make_server(f"shape-{name}", config=config, **model.environ).start()
            stack.callback(server.stop)
            return stack.enter_context(watched(get_sync_client(url=server.url)))

        yield start


@pytest.fixture(scope="module")
def react(make_project):
    return make_project("react")


@pytest.fixture(scope="module")
def memory(make_project):
    return make_project("memory")


@pytest.fixture(scope="module")
def team(make_project):
    return make_project("team")


@pytest.fixture(scope="module")
def deep(make_project):
    return make_project("deep")


@pytest.fixture(scope="module")
def retrieval(make_project):
    return make_project("retrieval")


@pytest.fixture(scope="module")
def research(make_project):
    return make_project("research")


def new_thread(client):
    return client.threads.create()["thread_id"]


def said(text):
    return {"messages": [{"role": "user", "content": text}]}


def text_of(message):
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(block.get("text", "") for block in content)


def last_text(values):
    return text_of(values["messages"][-1]).strip()


# --- an agent of create_agent -------------------------------------------------------------------


def test_an_agent_calls_its_tools_and_answers(react):
    values = react.runs.wait(new_thread(react), "agent", input=said('call add {"a": 2, "b": 3}'))
    assert last_text(values) == "result: 5"
    assert [message["type"] for message in values["messages"]] == ["human", "ai", "tool", "ai"]


def test_tokens_of_an_agent_are_streamed(react, model):
    parts = react.runs.stream(
        new_thread(react), "agent", input=said("say 20"), stream_mode="messages-tuple"
    )
    words = [text_of(part.data[0]) for part in parts if part.event == "messages"]
    assert "".join(words).split() == [f"word{number}" for number in range(20)]
    assert len([word for word in words if word]) == 20


@pytest.mark.parametrize("action", ["interrupt", "rollback"])
def test_a_cancel_closes_the_connection_to_the_model(react, model, action):
    thread_id, text = new_thread(react), f"say {100_000 + len(action)}"
    react.runs.wait(thread_id, "agent", input=said("first"))
    before = react.threads.get_state(thread_id)
    run = react.runs.create(thread_id, "agent", input=said(text), stream_mode="messages-tuple")
    call = model.wait_for_words(text)
    react.runs.cancel(thread_id, run["run_id"], wait=True, action=action)
    wait_until(lambda: call.was_closed_early, 30, "the end of the connection")
    after = react.threads.get_state(thread_id)
    if action == "rollback":
        assert after == before
    else:
        assert react.runs.get(thread_id, run["run_id"])["status"] == "interrupted"
    values = react.runs.wait(thread_id, "agent", input=said("again"))
    assert last_text(values) == "ok"


def test_an_agent_that_calls_its_tools_for_ever_is_stopped_by_its_limit(react, model):
    text = f'repeat add {{"a": 2, "b": {uuid.uuid4().int % 10**9}}}'
    values = react.runs.wait(new_thread(react), "agent", input=said(text))
    assert "limit" in last_text(values).lower()
    assert len([m for m in values["messages"] if m["type"] == "tool"]) <= 5
    calls = [m for m in values["messages"] if m["type"] == "ai" and m.get("tool_calls")]
    assert 0 < len(calls) <= 5


def test_a_tool_that_asks_is_answered(react):
    thread_id = new_thread(react)
    react.runs.wait(thread_id, "agent", input=said('call ask {"question": "how many?"}'))
    state = react.threads.get_state(thread_id)
    assert state["interrupts"][0]["value"] == {"question": "how many?"}
    assert react.threads.get(thread_id)["status"] == "interrupted"
    values = react.runs.wait(thread_id, "agent", command={"resume": "seven"})
    assert last_text(values) == "result: the user says seven"


@pytest.mark.parametrize(
    ("decision", "expected"),
    [
        ({"type": "approve"}, "paid 7"),
        (
            {"type": "edit", "edited_action": {"name": "pay", "args": {"amount": 8}}},
            "paid 8",
        ),
        ({"type": "reject", "message": "too much"}, "too much"),
    ],
)
def test_a_tool_call_is_decided_by_a_person(react, decision, expected):
    thread_id = new_thread(react)
    react.runs.wait(thread_id, "agent", input=said('call pay {"amount": 7}'))
    (question,) = react.threads.get_state(thread_id)["interrupts"]
    assert question["value"]["action_requests"][0]["args"] == {"amount": 7}
    values = react.runs.wait(thread_id, "agent", command={"resume": {"decisions": [decision]}})
    assert last_text(values).startswith("result: ")
    assert last_text(values).endswith(expected)


def test_a_long_conversation_is_summarized(react):
    thread_id = new_thread(react)
    for number in range(8):
        values = react.runs.wait(thread_id, "agent", input=said(f"message {number}"))
    texts = [text_of(message) for message in values["messages"]]
    assert len(texts) < 12
    assert any("summary" in text.lower() for text in texts)


def test_the_model_is_chosen_by_the_context(react):
    failed = react.runs.wait(
        new_thread(react),
        "agent",
        input=said("hi"),
        context={"model": "nobody:none"},
        raise_error=False,
    )
    assert "nobody" in json.dumps(failed["__error__"])
    values = react.runs.wait(
        new_thread(react), "agent", input=said("hi"), context={"model": "openai:other"}
    )
    assert last_text(values) == "ok"


def test_fifty_chats_at_once_are_all_answered_or_stopped(react):
    """Every second one is stopped in the middle and asked again."""

    async def chat(client, number):
        thread_id = (await client.threads.create())["thread_id"]
        stops = number % 2 == 0
        run = await client.runs.create(
            thread_id, "agent", input=said("say 5000" if stops else "say 5")
        )
        if stops:
            await client.runs.cancel(thread_id, run["run_id"], wait=True)
        else:
            await client.runs.join(thread_id, run["run_id"])
        status = (await client.runs.get(thread_id, run["run_id"]))["status"]
        answer = await client.runs.wait(thread_id, "agent", input=said("again"))
        return status, last_text(answer)

    async def chats():
        async with watched(get_client(url=str(react.http.client.base_url))) as client:
            return await asyncio.gather(*(chat(client, number) for number in range(50)))

    answers = asyncio.run(chats())
    assert answers == [("interrupted", "ok"), ("success", "ok")] * 25


# --- memories, written by another graph ---------------------------------------------------------


def test_memories_are_written_in_the_background_and_found_by_meaning(memory):
    user = {"configurable": {"user_id": uuid.uuid4().hex}}
    thread_id = new_thread(memory)
    memory.runs.wait(thread_id, "chatbot", input=said("aaa aaa"), config=user)
    namespace = ["memories", user["configurable"]["user_id"]]
    wait_until(lambda: memory.store.search_items(namespace)["items"], 30, "the memory")
    values = memory.runs.wait(new_thread(memory), "chatbot", input=said("a?"), config=user)
    assert values["messages"][-1]["additional_kwargs"]["known"] == "aaa aaa"
    other = {"configurable": {"user_id": uuid.uuid4().hex}}
    values = memory.runs.wait(new_thread(memory), "chatbot", input=said("a?"), config=other)
    assert values["messages"][-1]["additional_kwargs"]["known"] == ""


# --- retrieval ----------------------------------------------------------------------------------


def test_documents_are_indexed_for_a_user_and_found_by_that_user_alone(retrieval, tmp_path):
    def config_of(user):
        return {"configurable": {"user_id": user, "index_path": str(tmp_path / "index")}}

    documents = [{"page_content": "cats purr"}, {"page_content": "dogs bark loudly"}]
    state = retrieval.runs.wait(None, "indexer", input={"docs": documents}, config=config_of("ann"))
    assert state == {"docs": []}
    thread_id = new_thread(retrieval)
    retrieval.runs.wait(
        thread_id, "retrieval_graph", input=said("why do dogs bark"), config=config_of("ann")
    )
    retrieval.runs.wait(
        thread_id, "retrieval_graph", input=said("and what do cats do"), config=config_of("ann")
    )
    history = retrieval.threads.get_history(thread_id, limit=100)
    found = [one["values"].get("retrieved_docs") or [] for one in history]
    assert [document["page_content"] for document in found[0]] == ["cats purr"]
    assert ["dogs bark loudly"] in [[one["page_content"] for one in some] for some in found]
    values = history[0]["values"]
    assert values["queries"] == ["why do dogs bark", "and what do cats do ok"]
    foreign = retrieval.runs.wait(
        None, "retrieval_graph", input=said("why do dogs bark"), config=config_of("bob")
    )
    assert foreign["retrieved_docs"] == []


def test_a_retrieval_without_a_user_fails_with_the_error_of_the_graph(retrieval, tmp_path):
    config = {"configurable": {"user_id": "", "index_path": str(tmp_path / "index")}}
    thread_id = new_thread(retrieval)
    run = retrieval.runs.create(thread_id, "indexer", input={"docs": "text"}, config=config)
    retrieval.runs.join(thread_id, run["run_id"])
    assert retrieval.runs.get(thread_id, run["run_id"])["status"] == "error"


# --- parallel synchronous nodes -----------------------------------------------------------------


def searches(*texts):
    return said(f"call SearchQueryList {json.dumps({'query': texts})}")


def test_parallel_synchronous_searches_are_repeated_until_they_suffice(research):
    question = {**searches("say 2", "say 3", "say 4"), "max_research_loops": 3}
    values = research.runs.wait(new_thread(research), "agent", input=question)
    assert sorted(values["sources_gathered"]) == ["0", "1", "2", "3", "3"]
    assert last_text(values).count("word0") == 5
    page = httpx.get(research.http.client.base_url.join("/app/"))
    assert page.status_code == 200
    assert "<title>Research</title>" in page.text


@pytest.mark.parametrize("action", ["interrupt", "rollback"])
def test_a_cancel_closes_the_connections_of_parallel_synchronous_nodes(research, model, action):
    texts = [f"say {count + len(action)}" for count in (410_000, 420_000, 430_000)]
    thread_id = new_thread(research)
    research.runs.wait(thread_id, "agent", input=searches("say 1"))
    before = research.threads.get_state(thread_id)
    run = research.runs.create(thread_id, "agent", input=searches(*texts))
    calls = [model.wait_for_words(text) for text in texts]
    research.runs.cancel(thread_id, run["run_id"], wait=True, action=action)
    for call in calls:
        wait_until(lambda call=call: call.was_closed_early, 30, "the end of a connection")
    if action == "rollback":
        assert research.threads.get_state(thread_id) == before
    else:
        assert research.runs.get(thread_id, run["run_id"])["status"] == "interrupted"
    values = research.runs.wait(new_thread(research), "agent", input=searches("say 1"))
    assert last_text(values) == "word0"


# --- several agents -----------------------------------------------------------------------------


def test_an_agent_of_a_swarm_hands_over_and_stays_active(team):
    thread_id = new_thread(team)
    values = team.runs.wait(thread_id, "swarm", input=said("call to_bob {}"))
    assert values["active"] == "bob"
    assert values["messages"][-1]["name"] == "bob"
    values = team.runs.wait(thread_id, "swarm", input=said("hello"))
    assert (last_text(values), values["messages"][-1]["name"]) == ("ok", "bob")


def test_a_supervisor_sends_work_to_an_agent_and_gets_it_back(team):
    parts = list(
        team.runs.stream(
            new_thread(team),
            "supervised",
            input=said("call to_worker {}"),
            stream_mode="updates",
            stream_subgraphs=True,
        )
    )
    nodes = [node for part in parts if part.event == "updates" for node in part.data]
    assert [node for node in nodes if node in ("supervisor", "worker")][-2:] == [
        "worker",
        "supervisor",
    ]
    assert any(part.event.startswith("updates|worker:") for part in parts)


# --- deepagents with asynchronous subagents -----------------------------------------------------


def start_task(client, thread_id, description):
    arguments = json.dumps({"description": description, "subagent_type": "researcher"})
    values = client.runs.wait(thread_id, "lead", input=said(f"call start_async_task {arguments}"))
    found = re.search(r"task_id: ([0-9a-f-]{36})", last_text(values))
    assert found, values["messages"][-1]
    return found[1]


def test_an_asynchronous_subagent_notifies_its_parent(deep):
    thread_id = new_thread(deep)
    task_id = start_task(deep, thread_id, "say 3")
    thread = deep.threads.get(task_id)
    assert thread["metadata"]["subagent_name"] == "researcher"
    assert thread["metadata"]["parent_thread_id"] == thread_id

    def notified():
        messages = deep.threads.get_state(thread_id)["values"]["messages"]
        return [one for one in messages if "word0 word1 word2" in text_of(one)]

    wait_until(notified, 30, "the notification")
    wait_until(lambda: deep.threads.get(thread_id)["status"] == "idle", 30, "the parent")
    values = deep.runs.wait(
        thread_id, "lead", input=said(f'call check_async_task {{"task_id": "{task_id}"}}')
    )
    assert "success" in last_text(values)


def test_an_asynchronous_subagent_is_updated_and_cancelled(deep, model):
    thread_id = new_thread(deep)
    task_id = start_task(deep, thread_id, "say 200000")
    first = model.wait_for_words("say 200000")
    update = json.dumps({"task_id": task_id, "message": "say 300000"})
    deep.runs.wait(thread_id, "lead", input=said(f"call update_async_task {update}"))
    wait_until(lambda: first.was_closed_early, 30, "the end of the first run's call")
    second = model.wait_for_words("say 300000")
    cancel = json.dumps({"task_id": task_id})
    values = deep.runs.wait(thread_id, "lead", input=said(f"call cancel_async_task {cancel}"))
    assert "ancelled" in last_text(values)
    wait_until(lambda: second.was_closed_early, 30, "the end of the second run's call")
    statuses = {run["status"] for run in deep.runs.list(task_id)}
    assert statuses == {"interrupted"}
