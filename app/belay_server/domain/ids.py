"""Parse ids in the forms that clients may send."""

from __future__ import annotations

import re
from uuid import UUID

#: With or without dashes, in upper or lower case, or in braces, as LangGraph's server accepts it.
#: Python's own parser also accepts "0x", "+", underscores and the digits of every script.
_UUID = re.compile(
    r"\{?[0-9a-fA-F]{8}-?[0-9a-fA-F]{4}-?[0-9a-fA-F]{4}-?[0-9a-fA-F]{4}-?[0-9a-fA-F]{12}\}?"
)


def parse_uuid(text: object) -> UUID:
    """Return the UUID in a text, in a form that LangGraph's server accepts. Raises ValueError."""
    if not isinstance(text, str) or _UUID.fullmatch(text) is None:
        raise ValueError(f"not a UUID: {text!r}")
    return UUID(text)
