"""Test the connection between a worker's parent and a host."""

from __future__ import annotations

import os
import socket
import uuid

import pytest

from belay_workers.pool.child_process import Message
from belay_workers.pool.host_process import HostProcess, RunStream


@pytest.fixture
def ends():
    ours, theirs = socket.socketpair()
    host, stream = HostProcess(ours), RunStream(theirs)
    yield host, stream, theirs
    host.close()
    theirs.close()


def message(done=None, run_id=None):
    return Message(run_id or uuid.uuid4(), lambda _pid: None, done or (lambda: None))


def test_runs_are_sent_and_their_ends_reported(ends):
    host, stream, _ = ends
    done = []
    messages = [message(done=lambda number=number: done.append(number)) for number in range(3)]
    assert host.is_starting
    assert not host.takes_runs
    stream.report_ready()
    assert host.receive()
    assert host.pid == os.getpid()
    assert host.takes_runs
    assert all(host.give(one) for one in messages)
    assert list(stream.receive()) == [one.run_id for one in messages]
    stream.report_end(messages[1].run_id, was_claimed=True)
    stream.report_end(messages[0].run_id, was_claimed=False)
    assert host.receive()
    assert done == [1]
    assert host.take_declined() == [messages[0]]
    assert host.take_declined() == []
    assert host.outstanding() == [messages[2]]
    assert host.load == 1


def test_a_message_in_two_parts_is_read_as_one(ends):
    host, stream, theirs = ends
    stream.report_ready()
    assert host.receive()
    one = message()
    host.give(one)
    whole = b"e" + one.run_id.bytes
    theirs.sendall(whole[:5])
    assert host.receive()
    assert host.load == 1
    theirs.sendall(whole[5:])
    assert host.receive()
    assert host.load == 0


def test_a_run_may_be_given_twice(ends):
    """A doorbell may be duplicated; the second attempt finds the run claimed."""
    host, stream, _ = ends
    stream.report_ready()
    host.receive()
    done = []
    first = message(done=lambda: done.append("done"))
    second = message(done=lambda: done.append("done"), run_id=first.run_id)
    host.give(first)
    host.give(second)
    assert len(list(stream.receive())) == 2
    stream.report_end(first.run_id, was_claimed=False)
    host.receive()
    assert len(host.take_declined()) == 1
    stream.report_end(first.run_id, was_claimed=True)
    host.receive()
    assert done == ["done"]
    assert host.load == 0


def test_a_worn_host_takes_no_more_runs(ends):
    host, stream, _ = ends
    stream.report_ready()
    stream.report_worn()
    host.receive()
    assert host.is_worn
    assert not host.takes_runs


def test_both_ends_notice_the_end_of_the_other(ends):
    host, stream, theirs = ends
    theirs.close()
    assert not host.receive()
    ours, theirs = socket.socketpair()
    stream = RunStream(theirs)
    ours.close()
    assert list(stream.receive()) == []
    assert stream.is_closed
    theirs.close()
