"""Ids as clients may write them."""

from __future__ import annotations

import re
from uuid import UUID

#: With or without dashes, in any case, in braces: what the reference accepts. Python's own parser
#: also takes "0x", "+", underscores and the digits of every script.
_UUID = re.compile(
    r"\{?[0-9a-fA-F]{8}-?[0-9a-fA-F]{4}-?[0-9a-fA-F]{4}-?[0-9a-fA-F]{4}-?[0-9a-fA-F]{12}\}?"
)


def parse_uuid(text: object) -> UUID:
    """Raises ValueError."""
    if not isinstance(text, str) or _UUID.fullmatch(text) is None:
        raise ValueError(f"not a UUID: {text!r}")
    return UUID(text)
