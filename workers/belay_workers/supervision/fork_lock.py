"""A lock that is free whenever this process forks.

The parent of a pool has threads, and a fork copies the locks that they hold at that moment. In the
child no thread releases those copies. The broker's library closes its connections in a new child,
and would wait for its own lock forever. So the parent's threads use that library only while they
hold this lock, and a fork waits until the lock is free.
"""

from __future__ import annotations

import os
import threading


def never_while_forking() -> threading.Lock:
    """Return a new lock that every later fork of this process waits for.

    The registration with `os.register_at_fork` cannot be undone.
    """
    lock = threading.Lock()
    os.register_at_fork(
        before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release
    )
    return lock
