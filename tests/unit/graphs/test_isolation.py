"""Test where the runs of graphs are executed, by the configuration."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from belay_server.graphs.project.isolation import isolation_of

PROJECT = SimpleNamespace(
    graphs={
        "shared": SimpleNamespace(isolation="shared"),
        "process": SimpleNamespace(isolation="process"),
        "silent": SimpleNamespace(isolation=None),
        "agent": SimpleNamespace(isolation="shared"),
    },
    agent_runs_graph="agent",
)


@pytest.mark.parametrize(
    ("graph_id", "default", "debug_port", "is_shared"),
    [
        ("shared", "process", 0, True),
        ("shared", "process", 5678, False),
        ("process", "shared", 0, False),
        ("silent", "shared", 0, True),
        ("silent", "process", 0, False),
        ("agent", "shared", 0, False),
    ],
)
def test_a_graph_shares_hosts_by_its_own_or_the_default_isolation(
    graph_id, default, debug_port, is_shared
):
    settings = SimpleNamespace(isolation=default, debug_port=debug_port)
    found = isolation_of(settings, PROJECT, graph_id)
    assert found.is_shared is is_shared
    assert found.reason
