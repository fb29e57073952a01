"""Tell where the runs of a graph are executed, and why."""

from __future__ import annotations

import json
import logging

from belay_server.bus.client import RedisError
from belay_server.graphs.isolation import isolation_of
from belay_server.services.parts import Parts

log = logging.getLogger(__name__)


def placement_of(parts: Parts, graph_id: str) -> str | None:
    """Return `shared` or `process` with the reason, and which workers have isolated the graph, as
    the value of a header. None for a graph that the project does not have."""
    if graph_id not in parts.graphs:
        return None
    isolation = isolation_of(parts.settings, parts.graphs, graph_id)
    # As JSON, the name of a node cannot end the header's line, nor the text in quotes.
    reason = json.dumps(isolation.reason)
    words = ["shared" if isolation.is_shared else "process", f"reason={reason}"]
    if isolation.is_shared:
        try:
            isolated = parts.isolated_graphs.of(graph_id)
        except RedisError as error:
            log.warning("cannot read which workers have isolated graph '%s': %s", graph_id, error)
            isolated = {}
        words += [f'isolated-by="{worker}: {why}"' for worker, why in sorted(isolated.items())]
    return "; ".join(words)
