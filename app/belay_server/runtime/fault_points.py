"""Name the points of a run's life cycle at which the fault suite injects faults.

`reached` does nothing and costs one empty call. The fault suite starts the same processes with its
own `reached` (`tests/faults/injection`), which kills or stops a process, or cuts a connection, at
the point that a test names. Call it as `fault_points.reached`, so that the replacement is called.
"""

from __future__ import annotations

import enum
from uuid import UUID


class FaultPoint(enum.StrEnum):
    """The points, in the order of a run's life cycle."""

    BEFORE_COMMIT = "P0"
    COMMITTED = "P1"
    RUNG = "P2"
    DELIVERED = "P3"
    CLAIMED = "P4"
    GRAPH_LOADED = "P5"
    #: Inside a node: the code of a test's graph fails there by itself, without `reached`.
    INSIDE_NODE = "P6"
    BEFORE_WRITES = "P7"
    BEFORE_CHECKPOINT = "P8"
    BEFORE_END = "P9"
    END_COMMITTED = "P10"
    #: What follows the end of a run (a webhook) is sent after this.
    END_ANNOUNCED = "P11"
    ROLLING_BACK = "P12"


def reached(point: FaultPoint, run_id: UUID) -> None:
    """Do nothing. The process has reached this point with this run."""
