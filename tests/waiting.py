"""Waiting for something to become true, instead of sleeping in hope."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")


def wait_until(condition: Callable[[], _T], seconds: float = 20.0, what: str = "it") -> _T:
    """Poll until the condition is true; returns what it returned. Fails after `seconds`.

    The longer it has waited, the less often it looks (up to a tenth longer in all): looking takes
    CPU from what is waited for.
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
