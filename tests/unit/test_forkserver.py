"""Test that the forkserver of `multiprocessing` can be used by run after run of a child."""

from __future__ import annotations

import multiprocessing
import os
import sys

import pytest

from belay_workers.child.forkserver import end_forkserver


@pytest.fixture
def forkserver():
    yield multiprocessing.get_context("forkserver")
    end_forkserver()


def _use(context):
    process = context.Process(target=os.getpid)
    process.start()
    process.join(60)
    assert process.exitcode == 0


def test_a_forkserver_that_was_ended_is_started_again(forkserver):
    from multiprocessing.forkserver import _forkserver

    _use(forkserver)
    first = _forkserver._forkserver_pid
    end_forkserver()
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)
    _use(forkserver)
    assert _forkserver._forkserver_pid != first


def test_a_forkserver_that_a_node_has_ended_is_forgotten(forkserver):
    from multiprocessing.forkserver import _forkserver

    _use(forkserver)
    os.kill(_forkserver._forkserver_pid, 9)
    os.waitpid(_forkserver._forkserver_pid, 0)
    end_forkserver()
    _use(forkserver)


def test_nothing_is_imported_where_no_forkserver_was_used(monkeypatch):
    monkeypatch.delitem(sys.modules, "multiprocessing.forkserver", raising=False)
    end_forkserver()
    assert "multiprocessing.forkserver" not in sys.modules
