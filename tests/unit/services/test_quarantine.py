"""Test that the failure of one item does not affect the others."""

from __future__ import annotations

import itertools
import uuid

import psycopg
import pytest

from belay_server.services.quarantine import TRIES, Quarantine


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_failing_item_is_postponed_longer_each_time_then_set_aside():
    clock, aside, tries = Clock(), [], []
    quarantine = Quarantine("the thing", on_set_aside=lambda: aside.append(1), clock=clock)
    item = uuid.uuid4()

    def fail():
        tries.append(clock.now)
        raise psycopg.errors.ProgramLimitExceeded("too long")

    while len(aside) == 0:
        assert quarantine.handle(item, fail) is None
        clock.now += 0.5
    waits = [later - before for before, later in itertools.pairwise(tries)]
    assert len(tries) == TRIES
    assert waits == [1.0, 2.0, 4.0, 8.0]
    assert quarantine.put_off() == [item]
    clock.now += 3600
    assert quarantine.put_off() == []
    assert quarantine.handle(item, lambda: "done") == "done"
    assert quarantine.handle(item, lambda: "again") == "again"


def test_other_items_are_handled_while_one_is_postponed():
    quarantine = Quarantine("the thing", clock=Clock())
    bad, good = uuid.uuid4(), uuid.uuid4()
    quarantine.handle(bad, lambda: 1 // 0)
    assert quarantine.handle(good, lambda: "served") == "served"
    assert quarantine.handle(bad, lambda: "too early") is None


def test_an_outage_does_not_count_as_a_failure_of_an_item():
    quarantine = Quarantine("the thing", clock=Clock())
    item = uuid.uuid4()

    def lost():
        raise psycopg.OperationalError("the connection is lost")

    with pytest.raises(psycopg.OperationalError):
        quarantine.handle(item, lost)
    assert quarantine.handle(item, lambda: "done") == "done"
