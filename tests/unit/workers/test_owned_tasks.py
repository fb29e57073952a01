"""Code of one run cannot cancel the tasks of another, nor those of the host."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from contextvars import Context

import pytest

#: A host replaces functions of the whole process, so this is another one.
PROGRAM = """
import asyncio, uuid
from belay_server.domain.runs import Claim
from belay_workers.execution.project_code import ProjectCode
from belay_workers.host.event_loop import HostLoop
from belay_workers.host.gated_run import GatedRun
from belay_workers.host.gates import Gates
from belay_workers.host.owned_tasks import separate_tasks
from belay_workers.host.replaceable_functions import make_replaceable
make_replaceable()
from asyncio import all_tasks, gather, wait_for

class Slot:
    def is_interrupted(self, claim):
        return False

    def stepping(self, since):
        pass

async def look():
    other = asyncio.create_task(asyncio.sleep(60))
    return all_tasks() == asyncio.all_tasks() == {asyncio.current_task(), other}

async def wait_by(wait, task, ended):
    try:
        await wait(task)
    except asyncio.CancelledError:
        ended.append(wait.__name__)

def by_gather(task):
    return gather(task, asyncio.sleep(0.001))

def by_wait_for(task):
    return wait_for(task, 60)

async def stop_waits():
    # Cancel, as Belay does, tasks that wait for one of another run.
    task = loop.create_task(asyncio.sleep(60), context=runs[0].context)
    ended = []
    for wait in (by_gather, by_wait_for):
        waiting = loop.create_task(wait_by(wait, task, ended), context=runs[1].context)
        await asyncio.sleep(0.01)
        runs[1].cancel(waiting)
        await waiting
    runs[0].cancel(task)
    await asyncio.wait([task])
    others = await gather(asyncio.sleep(0, 1), wait_for(asyncio.sleep(0, 2), 9))
    print(ended, task.cancelled(), others)

async def main():
    tasks = [loop.create_task(look(), context=run.context) for run in runs]
    print([await task for task in tasks], len(all_tasks()))

loop = HostLoop(ProjectCode(lambda file: False), Gates())
runs = [GatedRun(Claim(uuid.uuid4(), 1), Slot()) for _ in range(2)]
separate_tasks()
loop.run_until_complete(main())
loop.run_until_complete(stop_waits())
"""


def test_a_run_sees_only_its_own_tasks_and_stops_waiting_for_others_alone():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=False
    )
    shown, waited = done.stdout.splitlines()
    assert shown == "[True, True] 3", done.stderr
    assert waited == "['by_gather', 'by_wait_for'] True [1, 2]", done.stderr


async def work(started: asyncio.Event) -> str:
    started.set()
    await asyncio.sleep(0.02)
    return "done"


@pytest.fixture
def neighbours(loop):
    """Two runs, and a task of the first."""
    mine, neighbour = loop.new_run(), loop.new_run()
    return mine, neighbour, loop.start(mine, work(asyncio.Event()))


def result_of(loop, task):
    return loop.loop.run_until_complete(asyncio.wait_for(task, 30))


def in_thread(function, *args):
    thread = threading.Thread(target=function, args=args)
    thread.start()
    thread.join()


#: How a run may call `cancel` of a task, on the event loop.
CANCELS = {
    "at once": lambda loop, run, task: task.cancel(),
    "soon": lambda loop, run, task: loop.call_soon(task.cancel),
    "in an empty context": lambda loop, run, task: loop.call_soon(task.cancel, context=Context()),
    "later": lambda loop, run, task: loop.call_later(0, task.cancel, context=Context()),
    # A host starts the threads of a run like this.
    "from a thread": lambda loop, run, task: in_thread(
        run.call, loop.call_soon_threadsafe, task.cancel
    ),
}


@pytest.mark.parametrize("how", CANCELS)
def test_a_cancel_by_another_run_has_no_effect(loop, neighbours, caplog, how):
    _, neighbour, task = neighbours

    async def interfere() -> None:
        CANCELS[how](asyncio.get_running_loop(), neighbour, task)

    result_of(loop, loop.start(neighbour, interfere()))
    assert result_of(loop, task) == "done"
    assert f"not of run {neighbour.claim.run_id}" in caplog.text


@pytest.mark.parametrize("how", CANCELS)
def test_a_run_can_cancel_its_own_task(loop, neighbours, how):
    mine, _, task = neighbours

    async def interfere() -> None:
        CANCELS[how](asyncio.get_running_loop(), mine, task)

    result_of(loop, loop.start(mine, interfere()))
    with pytest.raises(asyncio.CancelledError):
        result_of(loop, task)


def test_a_task_of_the_host_cannot_be_cancelled_by_a_run(loop):
    started = asyncio.Event()
    task = loop.loop.create_task(work(started))

    async def interfere() -> bool:
        await started.wait()
        return task.cancel()

    assert result_of(loop, loop.start(loop.new_run(), interfere())) is False
    assert result_of(loop, task) == "done"


def test_a_wait_for_the_task_of_another_run_can_be_cancelled_alone(loop, neighbours):
    _, neighbour, task = neighbours

    async def wait() -> str:
        try:
            async with asyncio.timeout(0):
                await task
        except TimeoutError:
            return "timed out, " + await task
        return "not cancelled"

    assert result_of(loop, loop.start(neighbour, wait())) == "timed out, done"
    assert task.result() == "done"


def test_the_task_of_another_run_that_has_ended_can_be_awaited(loop, neighbours):
    """Such as that of a cache, which runs share."""
    _, neighbour, task = neighbours
    assert result_of(loop, task) == "done"

    async def wait() -> list[str]:
        return [await task, *await asyncio.gather(task, task)]

    assert result_of(loop, loop.start(neighbour, wait())) == ["done"] * 3


@pytest.mark.parametrize("owner", ["its own code", "Belay", "another, when the run has ended"])
def test_other_cancels_have_their_effect(loop, neighbours, owner):
    mine, neighbour, task = neighbours

    async def interfere() -> None:
        task.cancel()

    if owner == "Belay":
        mine.cancel(task)
    elif owner == "its own code":
        loop.start(mine, interfere())
    else:
        mine.leave_slot()
        loop.start(neighbour, interfere())
    with pytest.raises(asyncio.CancelledError):
        result_of(loop, task)
