"""Wait until a condition is true, instead of sleeping for a fixed time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")


def wait_until(condition: Callable[[], _T], seconds: float = 20.0, what: str = "it") -> _T:
    """Poll until the condition is true. Return its result. Raises AssertionError after `seconds`.

    The interval grows with the time waited (to a tenth of it, 50 ms at most), because polling takes
    CPU time from the awaited work.
    """
    began = time.monotonic()
    while True:
        result = condition()
        if result:
            return result
        waited = time.monotonic() - began
        if waited > seconds:
            raise AssertionError(f"waited {seconds} s for {what}")
        time.sleep(min(0.05, max(0.01, waited / 10)))
