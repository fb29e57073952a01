"""Import a module as if another package were not installed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without(package: str) -> Iterator[None]:
    """Make imports of a package fail with ImportError within the block.

    `langgraph_sdk` imports LangGraph's own server if it is installed, as it is where a project's
    development tools are. That server then reads its settings and fails, because it is not the one
    that runs.
    """
    before = sys.modules.get(package)
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if before is None:
            del sys.modules[package]
        else:
            sys.modules[package] = before
