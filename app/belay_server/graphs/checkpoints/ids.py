"""Checkpoint ids sort by time, and the newest one is a thread's state.

LangGraph takes the time from the clock of the machine it runs on. So a worker whose clock is behind
that of the one before it would write checkpoints that sort before the ones it continues, and the
thread would seem to have stood still. Only the order counts: whoever has read a checkpoint makes
its next ids sort after it.
"""

from __future__ import annotations

from langgraph.checkpoint.base import id as library


def go_on_after(checkpoint_id: str) -> None:
    """Have this process's next checkpoint id sort after this one, whatever its clock says."""
    try:
        seen = library.UUID(checkpoint_id)
    except ValueError:
        return  # not an id that LangGraph made: it has no time
    if seen.version != 6:
        return
    last: int | None = library._last_v6_timestamp
    if last is None or last < seen.time:
        library._last_v6_timestamp = seen.time  # type: ignore[assignment]
