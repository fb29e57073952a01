"""What a caller may configure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True)
class Context:
    model: str = "openai:stand-in"
