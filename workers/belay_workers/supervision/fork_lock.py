"""A lock that is free whenever this process forks.

The parent of a pool has threads, and a fork copies the locks that they hold at that moment: in the
child nobody ever lets go of them. The broker's library, which cleans up what it finds in a new
child, would wait for its own for ever. So what the parent's threads do with it, they do under this
lock, and a fork waits for its turn.
"""

from __future__ import annotations

import os
import threading


def never_while_forking() -> threading.Lock:
    """For the rest of the process: what it registers cannot be taken back."""
    lock = threading.Lock()
    os.register_at_fork(
        before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release
    )
    return lock
