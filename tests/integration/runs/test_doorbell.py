"""Test the doorbell on a real broker: available, full, read-only and unavailable."""

from __future__ import annotations

from uuid import uuid4

import pytest
import redis

from belay_server.configuration.settings import Settings
from belay_server.db.runs import Ringable
from belay_server.doorbell import Doorbell, hosted_queue


@pytest.fixture
def prefix() -> str:
    return f"{uuid4().hex}:"


@pytest.fixture
def environ(valkey_url, prefix) -> dict[str, str]:
    return {
        "DATABASE_URL": "postgresql://nowhere/",
        "REDIS_URL": valkey_url,
        "BELAY_REDIS_PREFIX": prefix,
    }


@pytest.fixture
def doorbell(environ) -> Doorbell:
    return Doorbell.of(Settings.from_environ(environ))


@pytest.fixture
def bus(valkey_url):
    with redis.Redis.from_url(valkey_url) as client:
        yield client


def test_a_ring_is_a_message_in_the_queue_and_can_be_counted(doorbell, bus, prefix):
    assert doorbell.waiting("runs") == 0
    for _ in range(3):
        assert doorbell.ring(Ringable(uuid4(), "runs", "agent"))
    assert doorbell.ring(Ringable(uuid4(), "heavy", "agent"))
    assert doorbell.waiting("runs") == bus.llen(f"{prefix}runs") == 3
    assert doorbell.waiting("heavy") == 1


def test_graphs_that_share_hosts_have_a_queue_of_their_own(environ):
    doorbell = Doorbell.of(Settings.from_environ(environ), ["agent"])
    for graph_id in ("agent", "agent", "other"):
        assert doorbell.ring(Ringable(uuid4(), "runs", graph_id))
    assert doorbell.queue_of("runs", "agent") == hosted_queue("runs")
    assert doorbell.waiting(hosted_queue("runs")) == 2
    assert doorbell.waiting("runs") == 1


def test_a_ring_fails_without_an_exception_while_the_broker_is_full(doorbell, bus):
    bus.config_set("maxmemory", "1")
    try:
        assert doorbell.ring(Ringable(uuid4(), "runs", "agent")) is False
    finally:
        bus.config_set("maxmemory", "0")


def test_a_ring_fails_while_the_broker_is_unavailable_and_is_not_retried_at_once():
    environ = {"DATABASE_URL": "postgresql://nowhere/", "REDIS_URL": "redis://127.0.0.1:1/0"}
    doorbell = Doorbell.of(Settings.from_environ(environ))
    assert doorbell.ring(Ringable(uuid4(), "runs", "agent")) is False
    assert doorbell.ring(Ringable(uuid4(), "runs", "agent")) is False
    assert doorbell.waiting("runs") is None
