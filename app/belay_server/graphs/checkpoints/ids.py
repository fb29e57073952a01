"""The order of checkpoint ids. They sort by time, and the newest one is a thread's state.

LangGraph takes the time from the clock of the machine it runs on. A worker whose clock is behind
the previous worker's would write checkpoints that sort before the ones it continues, and the
thread's state would not change. Only the order counts: a process that has read a checkpoint creates
ids that sort after it.
"""

from __future__ import annotations

from langgraph.checkpoint.base import id as library


def go_on_after(checkpoint_id: str) -> None:
    """Make this process's next checkpoint id sort after this one, whatever its clock shows."""
    try:
        seen = library.UUID(checkpoint_id)
    except ValueError:
        return  # not an id that LangGraph created: it has no time
    if seen.version != 6:
        return
    last: int | None = library._last_v6_timestamp
    if last is None or last < seen.time:
        library._last_v6_timestamp = seen.time  # type: ignore[assignment]
