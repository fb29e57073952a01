"""Test how a factory of graphs is called: by the annotations and names of its parameters."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from langchain_core.runnables import RunnableConfig
from langgraph.store.memory import InMemoryStore
from langgraph_sdk.auth.types import BaseUser
from langgraph_sdk.runtime import ServerRuntime
from pydantic import BaseModel

from belay_server.graphs.project.factories import GraphFactory, GraphUse
from belay_server.graphs.project.loading import ProjectError

if TYPE_CHECKING:
    from decimal import Decimal  # not importable when the annotations are evaluated

CONFIG = {"configurable": {"thread_id": "t"}}
STORE = InMemoryStore()


@dataclass
class Voice:
    tone: str


class Model(BaseModel):
    tone: str


def use(access: Any = "threads.create_run", **fields: Any) -> GraphUse:
    return GraphUse(access, CONFIG, store=lambda: STORE, **fields)


def call(function: Any, **fields: Any) -> Any:
    return GraphFactory(function, "graph 'a'")(use(**fields))


def nothing():
    return ()


def unannotated(anything):
    return (anything,)


def the_config(config: RunnableConfig):
    return (config,)


def keyword(*, config: dict):
    return (config,)


def positional(config, /):
    return (config,)


def with_defaults(config, extra=None, *args, **kwargs):
    assert (extra, args, kwargs) == (None, (), {})
    return (config,)


def the_runtime(given: ServerRuntime):
    return (given,)


def by_name(runtime):
    return (runtime,)


def optional(runtime: ServerRuntime | None = None):
    return (runtime,)


def config_first(config: dict, runtime: ServerRuntime[Voice]):
    return config, runtime


def runtime_first(runtime: ServerRuntime[Voice], config: dict):
    return config, runtime


def not_evaluable(runtime: ServerRuntime[Decimal], config: Decimal):
    return config, runtime


class Callable:
    def __call__(self, runtime: ServerRuntime):
        return (runtime,)


@pytest.mark.parametrize(
    "function",
    [
        nothing,
        unannotated,
        the_config,
        keyword,
        positional,
        with_defaults,
        the_runtime,
        by_name,
        optional,
        config_first,
        runtime_first,
        not_evaluable,
        Callable(),
        functools.partial(config_first),
    ],
)
def test_a_factory_gets_a_config_a_runtime_or_both(function):
    for given in call(function):
        assert given is CONFIG or given.access_context == "threads.create_run"
    if function in (config_first, runtime_first, not_evaluable):
        config, runtime = call(function)
        assert config is CONFIG
        assert runtime.store is STORE


def test_a_factory_that_needs_more_is_refused_with_the_parameters_name():
    def needs_more(config, model):
        raise AssertionError

    with pytest.raises(ProjectError, match=r"graph 'a': its factory must take .* not 'model'"):
        GraphFactory(needs_more, "graph 'a'")


@pytest.mark.parametrize("access", ["threads.update", "threads.read", "assistants.read"])
def test_only_an_execution_has_a_context(access):
    (runtime,) = call(the_runtime, access=access, context={"tone": "dry"})
    assert runtime.access_context == access
    assert runtime.execution_runtime is None


@pytest.mark.parametrize("wanted", [Voice, Model])
def test_the_context_has_the_type_of_the_annotation(wanted):
    def factory(runtime):
        return runtime.execution_runtime.context

    factory.__annotations__["runtime"] = ServerRuntime[wanted]
    assert call(factory, context={"tone": "dry", "other": 1}) == wanted(tone="dry")
    assert call(factory, context=None) is None
    assert call(lambda runtime: runtime.context, context={"tone": "dry"}) == {"tone": "dry"}


def test_the_user_has_the_fields_of_authentication():
    (runtime,) = call(the_runtime, user={"identity": "ann", "plan": "gold"})
    user = runtime.ensure_user()
    assert isinstance(user, BaseUser)
    assert (user.identity, user.plan, user["plan"], user.get("team")) == (
        "ann",
        "gold",
        "gold",
        None,
    )
    assert (user.display_name, user.permissions, user["is_authenticated"]) == ("ann", [], True)
    with pytest.raises(AttributeError):
        _ = user.team
    (runtime,) = call(the_runtime)
    assert runtime.user is None
    with pytest.raises(PermissionError):
        runtime.ensure_user()
