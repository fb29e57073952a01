"""Limit the memory of a process for large states."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def limit_memory(more: int) -> None:
    """Limit this process to `more` bytes beyond its current memory. Do nothing except on Linux."""
    if sys.platform != "linux":
        return
    data_pages = int(Path("/proc/self/statm").read_bytes().split()[5])
    most = data_pages * resource.getpagesize() + more
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (most, hard))


@contextmanager
def limited_memory(more: int) -> Iterator[None]:
    """Limit this process to `more` bytes beyond its current memory within the block."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    limit_memory(more)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
