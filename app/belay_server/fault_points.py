"""Named moments of a run's life at which the fault suite makes something go wrong.

`reached` does nothing, and costs one empty call. The fault suite starts the same processes with a
`reached` of its own (`tests/faults/injection`), which kills, stops or cuts at the moment a test
names. Call it as `fault_points.reached`, so that the replacement is what is called.
"""

from __future__ import annotations

import enum
from uuid import UUID


class FaultPoint(enum.StrEnum):
    """In the order of a run's life."""

    BEFORE_COMMIT = "P0"
    COMMITTED = "P1"
    RUNG = "P2"
    DELIVERED = "P3"
    CLAIMED = "P4"
    GRAPH_LOADED = "P5"
    #: P6 is inside a node: the probe graph's own code.
    INSIDE_NODE = "P6"
    BEFORE_WRITES = "P7"
    BEFORE_CHECKPOINT = "P8"
    BEFORE_END = "P9"
    END_COMMITTED = "P10"
    #: What follows an end (a webhook) goes out after this.
    END_ANNOUNCED = "P11"
    ROLLING_BACK = "P12"


def reached(point: FaultPoint, run_id: UUID) -> None:
    """The process got to this point with this run."""
