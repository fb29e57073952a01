"""Test that a fork waits until no thread is in the broker's library."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import uuid

from belay_server.doorbell import Doorbell

#: Run in a separate process, because fork handlers cannot be unregistered.
FORKS = """
import os, threading, time
from belay_workers.supervision.fork_lock import never_while_forking

lock = never_while_forking()
entered, left = threading.Event(), []

def work():
    with lock:
        entered.set()
        time.sleep(0.2)
        left.append(True)

threading.Thread(target=work).start()
entered.wait()
pid = os.fork()
if pid == 0:
    os._exit(0 if left and lock.acquire(timeout=5) else 1)
assert os.waitpid(pid, 0)[1] == 0
assert lock.acquire(timeout=5)
"""


def test_a_fork_waits_for_the_lock_and_the_child_finds_it_free():
    subprocess.run([sys.executable, "-c", FORKS], check=True, timeout=60, env={**os.environ})


class Celery:
    """Records whether the lock was held at each use."""

    def __init__(self, lock):
        self._lock = lock
        self.held = []

    def send_task(self, *_args, **_options):
        self.held.append(self._lock.locked())

    def connection_for_write(self):
        self.held.append(self._lock.locked())
        raise OSError("no broker here")


def test_a_doorbell_uses_the_broker_only_while_it_holds_the_lock():
    lock = threading.Lock()
    celery = Celery(lock)
    doorbell = Doorbell(celery, turn=lock)
    assert doorbell.ring(uuid.uuid4(), "runs")
    assert doorbell.waiting("runs") is None
    assert celery.held == [True, True]
    assert not lock.locked()
