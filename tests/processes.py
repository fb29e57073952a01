"""What tests look at in processes."""

from __future__ import annotations

import psutil


def is_gone(pid: int) -> bool:
    """Return whether a process has ended, whether or not its parent has waited for it."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
