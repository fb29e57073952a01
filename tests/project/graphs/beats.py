"""Beats: lines that a node appends to a file named in the input, as proof that it executes."""

from __future__ import annotations

import os
import time


def beat(path: str | None, what: str) -> None:
    """Append `what pid clock` in one write, so that lines of several processes never mix."""
    if not path:
        return
    line = f"{what} {os.getpid()} {time.monotonic():.6f}\n".encode()
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(fd, line)
    finally:
        os.close(fd)
