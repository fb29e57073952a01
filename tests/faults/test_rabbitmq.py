"""Doorbells by RabbitMQ: runs of both kinds begin, also after the broker has been restarted."""

from __future__ import annotations

import pytest
from langgraph_sdk import get_sync_client

from tests.faults.conftest import Probe
from tests.rabbitmq import RabbitMissing, RabbitMQ

pytestmark = pytest.mark.long
#: A graph whose runs share hosts, and one whose runs do not.
GRAPHS = ("probe", "sync_probe")


@pytest.fixture
def rabbit(tmp_path):
    try:
        made = RabbitMQ(tmp_path / "rabbitmq")
    except RabbitMissing as missing:
        pytest.skip(str(missing))
    made.start()
    yield made
    made.kill()


@pytest.fixture
def probe(rabbit, make_cluster, tmp_path):
    cluster = make_cluster(workers=2, concurrency=2, BELAY_ISOLATION="auto", BROKER_URL=rabbit.url)
    with get_sync_client(url=cluster.url) as client:
        yield Probe(cluster, client, tmp_path / "history")


def start(probe, times, **options):
    return [probe.start(graph=graph, **options) for graph in GRAPHS * times]


def assert_done(probe, runs):
    for run in runs:
        probe.assert_done_once(*run)


def test_runs_begin_after_the_broker_was_killed(rabbit, probe):
    assert_done(probe, start(probe, 5))
    in_flight = start(probe, 2, seconds=0.5)
    rabbit.kill()
    created = start(probe, 3)
    rabbit.start()
    assert_done(probe, in_flight + created)
    assert_done(probe, start(probe, 5))
    for worker in probe.cluster.workers:
        assert "PRECONDITION_FAILED" not in worker.log.read_text()
