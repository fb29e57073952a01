"""Twenty runs share a host while some are asked, frozen, interrupted, or the host is killed.

Each schedule is made from a seed. The event loop, the gates, the places, the group commit and the
search for leftovers are the real ones; Postgres is a dictionary that checks claims, the supervisor
a thread, and the death of a process an event loop that is never run again. A run that nobody has
asked to stop ends as it does alone, and nothing of one run is found in another's events or
checkpoints.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import random
import signal
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from types import SimpleNamespace
from typing import Any

import pytest

from belay_server.domain.runs import Claim
from belay_workers.execution.project_code import ProjectCode
from belay_workers.execution.stops import ASK_SIGNAL, RunCancelled
from belay_workers.host.event_loop import HostLoop, LoopPolicy
from belay_workers.host.gated_run import GatedRun
from belay_workers.host.gates import Gates
from belay_workers.host.group_commit import GroupCommit, Together
from belay_workers.host.hosted_place import HostedPlace
from belay_workers.host.leftovers import HostLeftovers
from belay_workers.slots import SlotTable, StopReason
from tests.long_forms import long_case

RUNS = 20
STEPS = 4
GRACE_MS = 4
#: Seconds for which a step may block the event loop before its run is asked and interrupted.
BLOCKING_SECONDS = 0.004
SCHEDULES = 50
CHUNKS = 200


class ClaimOver(Exception):
    """A run has been claimed again."""


class Run:
    """A run as Postgres and its clients see it."""

    def __init__(self, number: int, kind: str) -> None:
        self.number = number
        self.kind = kind
        self.run_id = uuid.UUID(int=number + 1)
        self.claim_no = 0
        self.status = "pending"
        self.is_asked = False
        self.committed: list[int] = []
        self.events: list[tuple[int, int]] = []
        #: What was seen of other runs, or after the end.
        self.wrong: list[str] = []

    @property
    def claim(self) -> Claim:
        return Claim(self.run_id, self.claim_no)

    def note(self, what: int) -> None:
        """Note an event of this run's code, and check whose code is executed."""
        current = GatedRun.current()
        if current is None or current.claim.run_id != self.run_id:
            self.wrong.append(f"executed as {current}")
        if self.status not in ("running", "success"):  # what a success leaves may go on
            self.wrong.append(f"executed after {self.status}")
        self.events.append((self.claim_no, what))


def store(_conn: object, writes: Any) -> dict[Any, None]:
    """Store checkpoints together, unless one of the claims is over; leave some out."""
    if not all(map(_is_valid, writes)):
        return {}
    done = [write for write in writes if (write[0].number + write[2]) % 7]
    for write in done:
        put(write)
    return {write[:2]: None for write in done}


def _is_valid(write: tuple[Run, int, int]) -> bool:
    run, claim_no, _ = write
    return run.claim_no == claim_no and run.status == "running"


def store_alone(write: tuple[Run, int, int]) -> None:
    if not _is_valid(write):
        raise ClaimOver
    put(write)


def put(write: tuple[Run, int, int]) -> None:
    run, _, step = write
    if run.committed != list(range(step)):
        run.wrong.append(f"step {step} follows {run.committed}")
    run.committed.append(step)


CHECKPOINTS = Together(store, key=lambda write: write[:2])


class Database:
    def run(self, work: Any, *, keep_waiting: Any) -> Any:
        del keep_waiting
        return work(None)


class Nodes:
    """The code of the runs' graphs. `LOCK` is shared by all of them."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self.lock = asyncio.Lock()
        self.strays: list[asyncio.Task[None]] = []
        self.pool = pool

    async def step(self, run: Run, number: int) -> None:
        await getattr(self, run.kind)(run, number)

    async def turn(self, run: Run, number: int) -> None:
        run.note(number)
        await asyncio.sleep(0)

    async def sleep(self, run: Run, number: int) -> None:
        run.note(number)
        await asyncio.sleep(0.0005)
        run.note(number)

    async def tasks(self, run: Run, number: int) -> None:
        await asyncio.gather(*(self.turn(run, number) for _ in range(3)))

    async def callbacks(self, run: Run, number: int) -> None:
        loop = asyncio.get_running_loop()
        future = loop.create_future()

        def called() -> None:
            run.note(number)
            if not future.done():
                future.set_result(None)

        loop.call_soon(loop.call_later, 0.0003, called)
        await future

    async def chain(self, run: Run, number: int) -> None:
        """Leave a callback that calls itself again, and a task."""
        loop = asyncio.get_running_loop()

        def again() -> None:
            if run.status != "success":
                run.note(number)
                loop.call_later(0.0003, again)

        async def stray() -> None:
            while run.status != "success":
                await self.sleep(run, number)

        again()
        self.strays.append(asyncio.create_task(stray()))
        await self.turn(run, number)

    async def generator(self, run: Run, number: int) -> None:
        async def values() -> Any:
            for value in range(3):
                run.note(number)
                yield value
                await asyncio.sleep(0)

        async for value in values():
            if value == 1:
                break

    async def shared_lock(self, run: Run, number: int) -> None:
        async with self.lock:
            await self.turn(run, number)

    async def thread(self, run: Run, number: int) -> None:
        run.note(number)
        await asyncio.get_running_loop().run_in_executor(self.pool, time.sleep, 0.0002)
        run.note(number)

    async def swallow(self, run: Run, number: int) -> None:
        """Go on after each cancel, for ever once it was asked."""
        for _ in range(3):
            try:
                await self.turn(run, number)
            except asyncio.CancelledError:
                while run.status == "running":
                    try:
                        await self.sleep(run, number)
                    except asyncio.CancelledError:
                        continue

    async def block(self, run: Run, number: int) -> None:
        """Block the event loop until it is interrupted."""
        run.note(number)
        if number == 2:
            while run.status == "running":
                time.sleep(0.0002)
        await asyncio.sleep(0)


KINDS = (
    *("turn", "sleep", "tasks", "callbacks", "chain", "generator", "shared_lock", "thread"),
    *("swallow", "block"),
)
#: Nobody else can stop these: they are asked in every schedule.
ONLY_WHEN_ASKED = ("block",)


class Host:
    """A host process, as far as the places of runs need it."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        project = ProjectCode(lambda file: file == __file__)
        self.stops = self.stopping = 0
        self.gates = Gates()
        self.loop = HostLoop(project, self.gates)
        self.slots = SlotTable(RUNS + 4)
        self.settings = SimpleNamespace(cancel_grace_ms=GRACE_MS)
        self.database, self.database_thread = Database(), ThreadPoolExecutor(1)
        self.commits = GroupCommit(self.database, self.database_thread, self.loop)  # type: ignore[arg-type]
        self.access = SimpleNamespace(of_one_run=lambda: None)
        no_calls = SimpleNamespace(has_calls_to_cancel=False)
        self.checkpointer = None
        self.store = SimpleNamespace(of_place=lambda: no_calls)
        self.graphs = self.owner = self.unknown_graphs = self.event_log = None
        self.event_writer = self.announcer = None
        self.leftovers = HostLeftovers(
            self.loop,
            LoopPolicy(project, self.gates),
            self.gates,
            SimpleNamespace(work_for=lambda _: False),  # type: ignore[arg-type]
            SimpleNamespace(end=lambda _, is_stopped: False),  # type: ignore[arg-type]
        )
        self.places: dict[int, HostedPlace] = {}
        self.gated: list[GatedRun] = []
        self.context = copy_context()
        self.nodes = Nodes(pool)

    def graph_ids(self) -> list[str]:
        return []

    def clean_up(self, run: GatedRun) -> None:
        self.gated.append(run)

    async def attempt(self, run: Run) -> None:
        """Attempt a run, as `attempt_run` does."""
        run.claim_no += 1
        run.status = "running"
        place = self.places[run.number] = HostedPlace(self)  # type: ignore[arg-type]
        place.slot.claiming(run.run_id)
        place.slot.running(run.claim, run.run_id, 0.0)
        try:
            await place.run(run.claim, self.execute(run))
        except (asyncio.CancelledError, RunCancelled):
            assert place.asked is not StopReason.NONE, f"{run.kind} was not asked"
            run.status = "interrupted"
        else:
            run.status = "success" if place.asked is StopReason.NONE else "interrupted"
        finally:
            del self.places[run.number]
            place.release()

    async def execute(self, run: Run) -> str:
        claim_no = run.claim_no
        for step in range(len(run.committed), STEPS):
            await self.nodes.step(run, step)
            write = (run, claim_no, step)
            await self.commits.do(
                CHECKPOINTS,
                write,
                alone=lambda _conn, write=write: store_alone(write),  # type: ignore[misc]
                keep_waiting=lambda: False,
            )
        return "done"

    def ask(self, run: Run, *, interrupts: bool = False) -> None:
        """Ask a run to stop, as the supervisor does. Its signal is handled by `on_ask`."""
        run.is_asked = True
        readings = [one for one in self.slots.read_all() if one.run_id == run.run_id]
        for reading in readings:
            self.slots.ask(reading.slot, reading.claim, StopReason.CANCEL, interrupts=interrupts)

    def on_ask(self, *_: object) -> None:
        self.loop.call_soon_threadsafe(self.look_for_stops, context=self.context)
        self.gates.interrupt()

    def look_for_stops(self) -> None:
        for place in list(self.places.values()):
            place.look_for_a_stop()


class Supervisor(threading.Thread):
    """Asks and interrupts runs that block the event loop."""

    def __init__(self, host: Host, runs: list[Run]) -> None:
        super().__init__(daemon=True)
        self.host = host
        self.runs = {run.run_id: run for run in runs}
        self.is_over = threading.Event()

    def run(self) -> None:
        main = threading.main_thread().ident
        assert main is not None
        while not self.is_over.wait(0.001):
            for reading in self.host.slots.read_all():
                if 0 < reading.stepping_since < time.monotonic() - BLOCKING_SECONDS:
                    blocking = self.runs[reading.run_id]
                    if blocking.kind in ONLY_WHEN_ASKED:
                        self.host.ask(blocking, interrupts=True)
                        signal.pthread_kill(main, ASK_SIGNAL)


async def drive(host: Host, runs: list[Run], dice: random.Random, *, dies: bool) -> None:
    """Start the runs, and do what the schedule says, until all have ended or the host dies."""
    tasks = {asyncio.ensure_future(host.attempt(run)) for run in runs}
    ends_at = time.monotonic() + dice.uniform(0.001, 0.01)
    to_ask = [run for run in runs if dice.random() < 0.3 and not run.is_asked]
    while True:
        await asyncio.sleep(dice.choice((0, 0, 0.0005, 0.002)))
        if to_ask and dice.random() < 0.5:
            host.ask(to_ask.pop())
            host.look_for_stops()
        if dies and time.monotonic() >= ends_at:
            return
        if all(task.done() for task in tasks):
            break
    await asyncio.gather(*tasks)


def play(seed: int, pool: ThreadPoolExecutor, kept: list[Any]) -> list[Run]:
    """Play the schedule of a seed. `kept` gets what must not be collected before the end."""
    dice = random.Random(seed)
    runs = [Run(number, dice.choice(KINDS)) for number in range(RUNS)]
    deaths = dice.choice((0, 0, 1, 2))
    while active := [run for run in runs if run.status in ("pending", "running")]:
        host = Host(pool)
        kept.append(host)
        supervisor = Supervisor(host, runs)
        previous = signal.signal(ASK_SIGNAL, host.on_ask)
        supervisor.start()
        dies = deaths > 0
        deaths -= dies
        try:
            host.loop.run_until_complete(asyncio.wait_for(drive(host, active, dice, dies=dies), 60))
        finally:
            supervisor.is_over.set()
            supervisor.join()
            signal.signal(ASK_SIGNAL, previous)
            host.database_thread.shutdown()
        for run in runs:
            if run.status == "running":  # its host has died
                run.status = "interrupted" if run.is_asked else "pending"
    return runs


@pytest.fixture
def pool(caplog, monkeypatch):
    # What a dead host's runs have left complains when it is collected, also within another run,
    # which may be interrupted then: pytest's hook would fail.
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    caplog.set_level(logging.CRITICAL)  # a record of an error would keep its host until the end
    with ThreadPoolExecutor(2) as made:
        yield made
    gc.collect()  # what hosts and threads have left complains here, not in another test


def close(hosts: list[Host]) -> None:
    """Close the event loops of hosts, which are never run again: of dead ones in the middle."""
    for host in hosts:
        host.loop.close()


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.parametrize("chunk", [0, *map(long_case, range(1, CHUNKS))])
def test_a_run_that_nobody_asked_ends_as_alone(pool, chunk):
    for seed in range(chunk * SCHEDULES, (chunk + 1) * SCHEDULES):
        hosts: list[Any] = []
        runs = play(seed, pool, hosts)
        for run in runs:
            assert run.wrong == [], (seed, run.kind)
            if not run.is_asked:
                assert (run.status, run.committed) == ("success", [0, 1, 2, 3]), (seed, run.kind)
            assert {number for _, number in run.events} <= set(range(STEPS))
            assert run.committed == list(range(len(run.committed)))
        close(hosts)
