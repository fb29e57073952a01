"""Test the merge of a run's options with its assistant's, and the keys that clients cannot set."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import orjson
import pytest

from belay_server.domain.assistants import Assistant
from belay_server.domain.errors import BadRequest
from belay_server.domain.run_options import RunKwargs, RunOptions
from belay_server.domain.threads import ThreadDefaults
from belay_server.services.runs.kwargs import MergedRun, build_run_kwargs

RUN, THREAD, ASSISTANT = UUID(int=1), UUID(int=2), UUID(int=3)
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def assistant(**fields: Any) -> Assistant:
    return Assistant(
        **{
            "assistant_id": ASSISTANT,
            "graph_id": "agent",
            "name": "Agent",
            "description": None,
            "config": {},
            "context": {},
            "metadata": {},
            "version": 1,
            "created_at": NOW,
            "updated_at": NOW,
            "is_system": False,
            **fields,
        }
    )


def merge(
    options: RunOptions | None = None, of: Assistant | None = None, **given: Any
) -> MergedRun:
    return build_run_kwargs(
        options or RunOptions(assistant_id="agent"),
        assistant=of or assistant(),
        run_id=RUN,
        request_id="request",
        **{
            "thread": ThreadDefaults(THREAD),
            "headers": {},
            "user": None,
            "temporary": False,
            "defaults": {},
            **given,
        },
    )


def options(**given: Any) -> RunOptions:
    return RunOptions(assistant_id="agent", **given)


def given_in(where: str, given: dict[str, Any]) -> tuple[RunOptions, Assistant]:
    """Return a run's options and an assistant, one of which has these values."""
    if where == "assistant":
        return options(), assistant(config={"configurable": given})
    if where == "context":
        return options(context=given), assistant()
    return options(config={"configurable": given}), assistant()


def test_a_run_without_options_has_the_defaults_of_the_reference():
    document = merge().kwargs.to_document()
    configurable = document["config"].pop("configurable")
    assert document == {
        "input": None,
        "command": None,
        "config": {"metadata": {"graph_id": "agent", "assistant_id": str(ASSISTANT)}},
        "context": {},
        "stream_mode": ["values"],
        "interrupt_before": None,
        "interrupt_after": None,
        "webhook": None,
        "feedback_keys": None,
        "temporary": False,
        "subgraphs": False,
        "resumable": False,
        "checkpoint_during": True,
        "durability": "async",
    }
    assert configurable["run_id"] == str(RUN)
    assert configurable["thread_id"] == str(THREAD)
    assert configurable["langgraph_request_id"] == "request"


@pytest.mark.parametrize("place", ["configurable", "context"])
def test_the_run_overrides_the_assistant_which_overrides_the_project(place):
    defaults = {place: {"model": "project", "depth": "project", "tone": "project"}}
    of_assistant = {"model": "assistant", "depth": "assistant"}
    of_run = {"model": "run"}
    if place == "configurable":
        of, run = (
            assistant(config={"configurable": of_assistant}),
            options(config={"configurable": of_run}),
        )
    else:
        of, run = assistant(context=of_assistant), options(context=of_run)
    kwargs = merge(run, of, defaults=defaults).kwargs
    merged = kwargs.configurable if place == "configurable" else kwargs.context
    expected = {"model": "run", "depth": "assistant", "tone": "project"}
    assert {name: merged[name] for name in expected} == expected


def test_the_thread_gives_metadata_and_configurable_below_the_runs_own():
    thread = ThreadDefaults(
        THREAD,
        metadata={"a": 2, "b": 2, "run_id": "x", "graph_id": "other", "assistant_id": "x"},
        configurable={"a": 2, "b": 2, "thread_id": "x", "__own": "x"},
    )
    merged = merge(
        options(config={"configurable": {"a": 3}}, metadata={"a": 3}),
        assistant(
            config={"configurable": {"a": 1, "b": 1, "c": 1}}, metadata={"a": 1, "b": 1, "c": 1}
        ),
        thread=thread,
    )
    open_keys = {"a": 3, "b": 2, "c": 1}
    own = {"graph_id": "agent", "assistant_id": str(ASSISTANT)}
    assert merged.metadata == merged.kwargs.config["metadata"] == {**open_keys, **own}
    configurable = merged.kwargs.configurable
    assert {key: configurable[key] for key in open_keys} == open_keys
    assert (configurable["thread_id"], "__own" in configurable) == (str(THREAD), False)
    # Later runs inherit what the assistant of the first run had, not what the run itself set.
    assert merged.thread_configurable == {"a": 1, "b": 1, "c": 1}
    assert merged.kwargs.context == {"a": 3}


def test_a_context_is_copied_to_configurable_and_vice_versa():
    by_context = merge(options(context={"model": "a"})).kwargs
    by_config = merge(options(config={"configurable": {"model": "a"}})).kwargs
    assert by_context.configurable["model"] == by_config.context["model"] == "a"


def test_a_context_beside_a_configurable_is_refused():
    with pytest.raises(BadRequest, match="Cannot specify both configurable and context"):
        merge(options(context={"a": 1}, config={"configurable": {"b": 2}}))


def test_an_empty_context_beside_a_configurable_is_accepted():
    assert merge(options(context={}, config={"configurable": {"b": 2}})).kwargs.context == {"b": 2}


RESERVED = ["run_id", "thread_id", "assistant_id", "graph_id", "langgraph_auth_user", "__after__"]


@pytest.mark.parametrize("key", RESERVED)
@pytest.mark.parametrize("where", ["run", "context", "assistant"])
def test_a_client_cannot_set_reserved_keys(key, where):
    run, of = given_in(where, {key: "forged", "open": True})
    configurable = merge(run, of).kwargs.configurable
    assert configurable.get(key) != "forged"
    assert configurable["open"] is True


def test_headers_and_the_user_reach_the_graph():
    user = {"identity": "alice", "permissions": ["read"], "team": "a"}
    configurable = merge(headers={"x-tenant": "t1"}, user=user).kwargs.configurable
    assert configurable["x-tenant"] == "t1"
    assert configurable["langgraph_auth_user"] == user
    assert configurable["langgraph_auth_user_id"] == "alice"
    assert configurable["langgraph_auth_permissions"] == ["read"]


@pytest.mark.parametrize("where", ["run", "context", "assistant"])
def test_a_user_id_of_the_client_is_kept(where):
    """Agents keep each user's memories under it. The authenticated user is in other keys."""
    given = {"user_id": "u-7"}
    run, of = given_in(where, given)
    merged = merge(run, of, user={"identity": "alice"})
    assert merged.kwargs.configurable["user_id"] == "u-7"
    assert merged.kwargs.configurable["langgraph_auth_user_id"] == "alice"
    assert merged.thread_config["configurable"] == given


@pytest.mark.parametrize(("user", "expected"), [(None, ""), ({"identity": "alice"}, "alice")])
def test_the_default_of_user_id_is_the_identity(user, expected):
    merged = merge(user=user)
    assert merged.kwargs.configurable["user_id"] == expected
    assert merged.thread_config["configurable"] == {}


def test_the_langsmith_project_of_a_run_is_in_its_configurable():
    tracer = {"project_name": "mine", "example_id": "e"}
    configurable = merge(options(langsmith_tracer=tracer)).kwargs.configurable
    assert configurable["__langsmith_project__"] == "mine"
    assert configurable["__langsmith_example_id__"] == "e"
    for none in ({}, {"project_name": None}):
        configurable = merge(options(langsmith_tracer=none)).kwargs.configurable
        assert not any(key.startswith("__langsmith") for key in configurable)


def test_tags_are_merged_without_duplicates_and_other_config_replaced():
    of = assistant(config={"tags": ["a", "b"], "recursion_limit": 5, "run_name": "of assistant"})
    merged = merge(options(config={"tags": ["b", "c"], "recursion_limit": 7}), of)
    for config in (merged.kwargs.config, merged.thread_config):
        assert config["tags"] == ["a", "b", "c"]
        assert config["recursion_limit"] == 7
        assert config["run_name"] == "of assistant"


def test_metadata_of_the_run_overrides_the_assistants_but_no_reserved_key():
    forged = dict.fromkeys(("run_id", "thread_id", "assistant_id", "cron_id"), "forged")
    of = assistant(metadata={"owner": "assistant", "kind": "assistant"})
    merged = merge(
        options(metadata={"owner": "run", **forged}, config={"metadata": {"trace": 1, **forged}}),
        of,
    )
    assert merged.metadata == {
        "owner": "run",
        "kind": "assistant",
        "graph_id": "agent",
        "assistant_id": str(ASSISTANT),
    }
    assert merged.kwargs.config["metadata"] == {"trace": 1, **merged.metadata}


def test_the_config_of_the_thread_has_no_server_or_request_keys():
    merged = merge(
        options(config={"configurable": {"model": "a"}, "metadata": {"trace": 1}}),
        headers={"x-secret": "s"},
        user={"identity": "alice"},
    )
    assert merged.thread_config == {"configurable": {"model": "a"}}


ADDRESS = {"checkpoint_id": "c", "checkpoint_ns": "sub:1", "checkpoint_map": {"": "r"}}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"checkpoint": ADDRESS}, ADDRESS),
        ({"checkpoint_id": RUN}, {"checkpoint_id": str(RUN)}),
        ({"config": {"configurable": {"checkpoint_id": "c"}}}, {"checkpoint_id": "c"}),
        (
            {"checkpoint": {"checkpoint_id": "a"}, "checkpoint_id": RUN},
            {"checkpoint_id": "a"},
        ),
        # Only `checkpoint` may have a subgraph's namespace. In the config it is ignored.
        ({"config": {"configurable": {"checkpoint_ns": "sub:1"}}}, {}),
        ({}, {}),
    ],
)
def test_a_checkpoint_may_be_given_in_three_ways(given, expected):
    kwargs = merge(options(**given)).kwargs
    assert {k: v for k, v in kwargs.configurable.items() if k.startswith("checkpoint")} == expected
    assert kwargs.starts_at_checkpoint is bool(expected)


@pytest.mark.parametrize(
    ("given", "durability"),
    [
        ({}, "async"),
        ({"checkpoint_during": True}, "async"),
        ({"checkpoint_during": False}, "exit"),
        ({"checkpoint_during": False, "durability": "sync"}, "sync"),
        ({"durability": "exit"}, "exit"),
    ],
)
def test_checkpoint_during_is_translated_to_durability(given, durability):
    kwargs = merge(options(**given)).kwargs
    assert kwargs.durability == durability
    assert kwargs.writes_behind is (durability == "async")


def test_stored_kwargs_are_read_back_unchanged():
    kwargs = merge(
        options(
            input={"a": 1},
            command={"resume": {"i": 1}},
            strict_resume=True,
            output_schema={"type": "object"},
            stream_mode=["updates"],
            stream_resumable=True,
            interrupt_before=["*"],
        ),
        temporary=True,
    ).kwargs
    stored = orjson.loads(orjson.dumps(kwargs.to_document()))
    assert RunKwargs.from_document(stored) == kwargs
    assert RunKwargs.from_document({**stored, "of_a_later_version": 1}) == kwargs


def test_options_are_read_from_stored_json_without_other_keys():
    made = RunOptions.from_document(
        {"assistant_id": "agent", "schedule": "* * * * *", "stream_mode": None, "input": {}}
    )
    assert made == options(input={})


def test_options_list_the_nodes_that_they_name():
    named = options(
        interrupt_before=["a"],
        interrupt_after=["*"],
        command={"goto": ["b", {"node": "c", "input": 1}]},
    ).named_nodes
    assert sorted(named) == ["*", "a", "b", "c"]
    assert options(command={"goto": "b"}).named_nodes == ["b"]
    assert options().named_nodes == []


def test_options_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        options().input = 1  # type: ignore[misc]
