"""Test that an end which is announced while the run's row is read ends the wait."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from uuid import uuid4

from belay_server.bus.event_log import START
from belay_server.bus.run_feed import Subscription
from belay_server.services.runs import cancellation


class Watched(Subscription):
    """A subscription that must not wait when the end has been announced."""

    def _wait(self, until: float) -> bool:
        raise AssertionError("it waits, although the end was announced")


def test_an_end_that_is_announced_during_the_query_is_not_missed(monkeypatch):
    run_id = uuid4()
    subscription = Watched(run_id, after=START, events=False, on_room=lambda _: None)
    queries = []

    def ended_runs(_conn, run_ids):
        """Return what the rows were before the end that is announced meanwhile."""
        queries.append(run_ids)
        if len(queries) == 1:
            subscription.end()
            return set()
        return set(run_ids)

    monkeypatch.setattr(cancellation.run_rows, "ended_runs", ended_runs)
    parts = SimpleNamespace(
        database=SimpleNamespace(connection=nullcontext),
        feed=SimpleNamespace(
            subscribe=lambda _run_id, events: subscription, unsubscribe=lambda _: None
        ),
    )
    assert cancellation.wait_until_ended(parts, [])
    assert queries == []
    assert cancellation.wait_until_ended(parts, [run_id])
    assert len(queries) == 2
