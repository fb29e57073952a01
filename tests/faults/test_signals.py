"""Termination signals to every process of a worker, as Heroku and systemd send them: each run is
put back or ends normally, without an attempt charged."""

from __future__ import annotations

import os
import signal
from contextlib import suppress

import pytest

from tests.long_forms import long_case
from tests.waiting import wait_until


def to_the_group(worker, number) -> None:
    """Send a signal to the worker's group, then to each child, which has its own group."""
    children = worker.children()
    os.killpg(worker.pid, number)
    for child in children:
        with suppress(ProcessLookupError):
            os.kill(child.pid, number)


def to_each_child_first(worker, number) -> None:
    for child in worker.children():
        with suppress(ProcessLookupError):
            os.kill(child.pid, number)
    worker.send(number)


def in_flight(probe, count=2):
    """Start sync and async runs, and wait for their second step."""
    runs = [
        probe.start(seconds=2.0, graph=graph)
        for graph in ("sync_probe", "probe")
        for _ in range(count)
    ]
    beats = [probe.wait_for(tag, "s2") for _, _, tag in runs]
    return runs, beats


@pytest.mark.parametrize(
    ("send", "number"),
    [
        (to_the_group, signal.SIGTERM),
        long_case(to_the_group, signal.SIGINT),
        long_case(to_each_child_first, signal.SIGTERM),
        long_case(to_each_child_first, signal.SIGINT),
    ],
)
def test_a_signal_to_every_process_drains_the_worker(cluster, probe, send, number):
    runs, beats = in_flight(probe)
    worker, _ = probe.worker_of(beats[0].pid)
    here = {child.pid for child in worker.children()}
    stopped = [run for run, beat in zip(runs, beats, strict=True) if beat.pid in here]
    assert stopped
    send(worker, number)
    assert worker.process.wait(30) == 0
    cluster.restart(worker)
    for thread_id, run_id, tag in runs:
        probe.assert_done_once(thread_id, run_id, tag)
        assert probe.row(run_id)["attempts"] == 1
    for _, _, tag in stopped:
        assert probe.starts(tag).count("s1") == 1


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, *map(long_case, (signal.SIGHUP, signal.SIGQUIT, signal.SIGINT))]
)
@pytest.mark.parametrize("graph", ["sync_probe", "probe"])
def test_a_busy_child_ignores_termination_signals(cluster, probe, number, graph):
    thread_id, run_id, tag = probe.start(seconds=0.4, graph=graph)
    pid = probe.wait_for(tag, "s2").pid
    os.kill(pid, number)
    probe.assert_done_once(thread_id, run_id, tag)
    assert {beat.pid for beat in probe.beats(tag)} == {pid}
    assert probe.row(run_id)["claim_no"] == 1


def test_an_idle_child_ignores_termination_signals(cluster, probe):
    thread_id, run_id, tag = probe.start()
    probe.assert_done_once(thread_id, run_id, tag)
    worker, _ = probe.worker_of(probe.beats(tag)[0].pid)
    before = {child.pid for child in worker.children()}
    for pid in before:
        os.kill(pid, signal.SIGTERM)
    for _ in range(6):
        probe.assert_done_once(*probe.start())
    wait_until(lambda: before <= {c.pid for c in worker.children()}, 10, "all of them to be there")
