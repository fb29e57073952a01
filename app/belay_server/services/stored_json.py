"""Pass JSON from Postgres on to clients without decoding it.

Postgres writes 1e308 as an integer of 309 digits, which some clients would parse as an integer.
Documents with such numbers are encoded again; large ones in a separate process.
"""

from __future__ import annotations

import re

from belay_server.runtime.turns import wait_for_turn
from belay_server.services.parts import Parts
from belay_server.states import jobs as state_jobs

#: An integer of 64 bits has at most 20 digits.
_HUGE = re.compile(rb"[0-9]{20}")
_HUGE_DIGITS = 20
#: Searching this many bytes takes a few milliseconds.
_AT_ONCE = 256 * 1024


def as_json(parts: Parts, stored: str, caller: str | None) -> bytes:
    """Return the JSON of a column that was read as text. Encode it again if it has huge numbers.

    Raises TooMany, StateTooLarge.
    """
    document = stored.encode()
    if not _has_huge_numbers(document):
        return document
    if len(document) <= parts.settings.large_state_bytes:
        return state_jobs.encode_again(parts.states.here, document)
    return parts.states.run_for(caller, state_jobs.encode_again, document)


def _has_huge_numbers(document: bytes) -> bool:
    """Return whether there is an integer of 20 digits or more. Search piece by piece, and yield to
    other requests between two pieces."""
    for at in range(0, len(document), _AT_ONCE):
        if at:
            wait_for_turn()
        if _HUGE.search(document, at, at + _AT_ONCE + _HUGE_DIGITS):
            return True
    return False
