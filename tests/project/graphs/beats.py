"""Proof of work at the node: lines appended to a file that the test named in the input."""

from __future__ import annotations

import os
import time


def beat(path: str | None, what: str) -> None:
    """Append `what pid clock`, in one write, so that lines of several processes never mix."""
    if not path:
        return
    line = f"{what} {os.getpid()} {time.monotonic():.6f}\n".encode()
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(fd, line)
    finally:
        os.close(fd)
