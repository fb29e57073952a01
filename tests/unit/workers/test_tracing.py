"""Test that a run is traced in the LangSmith project that it names, and only if tracing is on."""

from __future__ import annotations

import pytest
from langchain_core.tracers import LangChainTracer, langchain
from langsmith import utils

from belay_server.domain.run_options import RunKwargs
from belay_workers.execution.graph_executor import Execution

NAMED = {"__langsmith_project__": "mine"}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("LANGSMITH_TRACING", "LANGSMITH_TRACING_V2", "LANGCHAIN_TRACING_V2"):
        monkeypatch.delenv(name, raising=False)
    # A real client starts a thread that connects to LangSmith.
    monkeypatch.setattr(langchain, "get_client", lambda: None)
    utils.get_env_var.cache_clear()
    yield monkeypatch
    utils.get_env_var.cache_clear()


def callbacks(configurable):
    execution = Execution(
        graph=None,
        saver=None,
        store=None,
        kwargs=RunKwargs(config={"configurable": {"graph_id": "a", **configurable}}),
        resumes=False,
        attempt=1,
        redact_errors=False,
    )
    return execution.config.get("callbacks")


def test_a_run_is_traced_in_its_project(environment):
    environment.setenv("LANGSMITH_TRACING", "true")
    (tracer,) = callbacks(NAMED)
    assert isinstance(tracer, LangChainTracer)
    assert tracer.project_name == "mine"
    assert callbacks({}) is None


def test_nothing_is_traced_while_tracing_is_off():
    assert callbacks(NAMED) is None
