"""Disable the garbage collector during start-up.

Import this first; call `started()` when loading is done. What a process loads at start-up stays
until its end. Collections meanwhile take a fifth of the start-up time, and each later full
collection would visit it again. So `started` collects once and then excludes it for good.
"""

from __future__ import annotations

import gc

gc.disable()


def started() -> None:
    """Collect garbage once, exclude what is left from collection, and enable the collector."""
    gc.collect()
    gc.freeze()
    gc.enable()
