"""An event loop of a host, with runs on it, for unit tests."""

from __future__ import annotations

import asyncio
import inspect
import threading
import uuid
from pathlib import Path

import pytest

from belay_server.domain.runs import Claim
from belay_workers.execution.project_code import ProjectCode
from belay_workers.host.event_loop import HostLoop
from belay_workers.host.gated_run import GatedRun
from belay_workers.host.gates import Gates
from belay_workers.slots import Kind, SlotTable

#: Set while a test is executed. The coroutines that a run has kept are closed after it.
TESTING = threading.Event()


def is_test(file: str) -> bool:
    """Return whether a file has code of the project: that of the tests has."""
    return Path(file).parent == Path(__file__).parent


class Loop:
    """An event loop with gates, and the runs on it."""

    def __init__(self) -> None:
        self.gates = Gates()
        self.project = ProjectCode(is_test)
        self.loop = HostLoop(self.project, self.gates)
        self.slots = SlotTable(4)
        self.runs: list[GatedRun] = []

    def new_run(self) -> GatedRun:
        claim = Claim(uuid.uuid4(), 1)
        slot = self.slots.take(Kind.HOSTED_RUN)
        slot.claiming(claim.run_id)
        slot.running(claim, uuid.uuid4(), 0.0)
        self.runs.append(GatedRun(claim, slot))
        return self.runs[-1]

    def start(self, run: GatedRun, coroutine) -> asyncio.Task:
        return self.loop.create_task(coroutine, context=run.context)

    def turn(self, seconds: float = 0.05) -> None:
        self.loop.run_until_complete(asyncio.sleep(seconds))


@pytest.fixture
def loop():
    made = Loop()
    TESTING.set()
    yield made
    TESTING.clear()
    for kept in [kept for run in made.runs for kept in run.kept]:
        if inspect.isasyncgen(kept):
            made.loop.run_until_complete(kept.aclose())
        else:
            (kept.get_coro() if hasattr(kept, "get_coro") else kept).close()
    made.loop.close()
