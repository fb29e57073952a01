"""Test the stopper without a pool: requests to stop, and the detection of dead child processes."""

from __future__ import annotations

import fcntl
import os
import resource
import subprocess
import sys
import uuid

from belay_server.domain.runs import Claim
from belay_workers.slots import StopReason
from belay_workers.supervision.stopper import StopRequests, _is_dead, _Watched


def claim():
    return Claim(uuid.uuid4(), 1)


def test_a_cancel_replaces_a_drain_and_is_not_replaced_by_a_timeout():
    requests = StopRequests()
    one = claim()
    assert requests.add(one, StopReason.DRAIN)
    assert requests.add(one, StopReason.CANCEL)
    assert not requests.add(one, StopReason.TIMEOUT)
    assert requests.reason_for(one) is StopReason.CANCEL
    assert requests.reason_for(claim()) is StopReason.NONE


def test_a_stop_request_is_forgotten_when_its_run_has_left_its_slot():
    requests = StopRequests()
    here, gone, late = claim(), claim(), claim()
    requests.add(here, StopReason.CANCEL)
    requests.add(gone, StopReason.CANCEL)

    def current():
        requests.add(late, StopReason.CANCEL)  # while the slots are being read
        return {here}

    requests.forget_all_but(current)
    assert here in requests
    assert gone not in requests
    assert late in requests


def test_a_death_is_detected_with_a_high_descriptor_number():
    """A worker with many child processes has higher descriptors than `select` supports."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 2048)), hard))
    try:
        process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        first = os.pidfd_open(process.pid)
        pidfd = fcntl.fcntl(first, fcntl.F_DUPFD, 1500)
        os.close(first)
        child = _Watched(process.pid, pidfd)
        assert not _is_dead(child)
        process.communicate(b"\n")
        assert _is_dead(child)
        os.close(pidfd)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
