"""Commands to a graph, from JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from langgraph.types import Command, Send


def to_command(command: Mapping[str, Any]) -> Command[Any]:
    """Return the Command of a JSON object, in which pairs are lists and a Send is {node, input}."""
    update = command.get("update")
    if isinstance(update, list):
        update = [tuple(pair) if isinstance(pair, list) else pair for pair in update]
    goto = command.get("goto") or ()
    targets = goto if isinstance(goto, (list, tuple)) else [goto]
    sends = [
        Send(target["node"], target.get("input")) if isinstance(target, dict) else target
        for target in targets
    ]
    return Command(update=update, resume=command.get("resume"), goto=sends)
