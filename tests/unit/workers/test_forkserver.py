"""Test that the forkserver of `multiprocessing` can be used by run after run of a child."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys

import pytest

from belay_workers.child.forkserver import Forkserver


@pytest.fixture
def forkserver():
    """That of a child before its first run, whose server process ends with the test."""
    made = Forkserver()
    yield made
    made.end()


def _use():
    process = multiprocessing.get_context("forkserver").Process(target=os.getpid)
    process.start()
    process.join(60)
    assert process.exitcode == 0


def _pid():
    from multiprocessing.forkserver import _forkserver

    return _forkserver._forkserver_pid


def test_a_forkserver_that_was_ended_is_started_again(forkserver):
    _use()
    first = _pid()
    forkserver.end()
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)
    _use()
    assert _pid() != first


def test_a_forkserver_that_a_node_has_ended_is_forgotten(forkserver):
    _use()
    os.kill(_pid(), 9)
    os.waitpid(_pid(), 0)
    forkserver.end()
    _use()


def test_a_forkserver_of_the_workers_parent_stays(forkserver):
    _use()
    inherited = _pid()
    Forkserver().end()
    os.kill(inherited, 0)
    _use()
    assert _pid() == inherited


def test_a_process_that_is_not_a_child_of_this_one_is_not_killed(forkserver, monkeypatch):
    from multiprocessing.forkserver import _forkserver

    program = "import subprocess; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True)"
    with subprocess.Popen(
        [sys.executable, "-c", f"{program}; input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        stranger = int(other.stdout.readline())
        monkeypatch.setattr(_forkserver, "_forkserver_pid", stranger)
        forkserver.end()
        os.kill(stranger, 0)
        os.kill(stranger, 9)
        other.communicate("\n")


def test_nothing_is_imported_where_no_forkserver_was_used(forkserver, monkeypatch):
    monkeypatch.delitem(sys.modules, "multiprocessing.forkserver", raising=False)
    Forkserver().end()
    assert "multiprocessing.forkserver" not in sys.modules
