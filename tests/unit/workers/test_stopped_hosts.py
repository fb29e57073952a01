"""Hosts that a signal has stopped are given up after a minute."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from belay_workers.slots import Kind, SlotTable
from belay_workers.supervision.stopped_hosts import StoppedHosts


@pytest.fixture
def host():
    """A host's slot, and what is looked at: whether its process is stopped, and the time."""
    slots = SlotTable(2)
    slots.take(Kind.HOST)
    found = SimpleNamespace(slots=slots, is_stopped=True, now=1000.0)
    found.hosts = StoppedHosts(lambda _pid: found.is_stopped, lambda: found.now)
    return found


def is_given_up(host, *, after: float) -> bool:
    host.now += after
    host.hosts.look(host.slots.read_all())
    return host.hosts.is_given_up(os.getpid())


def test_a_host_is_given_up_when_it_has_been_stopped_for_a_minute(host):
    assert not is_given_up(host, after=0)
    assert not is_given_up(host, after=60)
    assert is_given_up(host, after=1)


def test_a_host_that_is_continued_is_not_given_up(host):
    assert not is_given_up(host, after=0)
    host.is_stopped = False
    assert not is_given_up(host, after=61)
    host.is_stopped = True
    assert not is_given_up(host, after=61)
    assert is_given_up(host, after=61)


def test_only_hosts_are_looked_at():
    slots = SlotTable(2)
    slots.take(Kind.CHILD)
    hosts = StoppedHosts(lambda _pid: True, lambda: 0.0)
    hosts.look(slots.read_all())
    assert not hosts.is_given_up(os.getpid())
