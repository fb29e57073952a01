"""The signal handlers of a host's runs are called as code of the runs that have set them."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

#: Signal handlers concern the whole process, so this is another one.
PROGRAM = '''
import asyncio, faulthandler, os, signal, subprocess, sys, threading, time, uuid
from pathlib import Path
from belay_server.domain.runs import Claim
from belay_workers.execution.project_code import ProjectCode
from belay_workers.host.event_loop import HostLoop
from belay_workers.host.gated_run import GatedRun
from belay_workers.host.gates import Gates
from belay_workers.host.signal_handlers import HostSignals

class Slot:
    def is_interrupted(self, claim):
        return False

    def stepping(self, since):
        pass

def interrupt(*_):
    called.append("interrupt")

RAISE = "import signal; signal.raise_signal(signal.SIGALRM)"
loop = HostLoop(ProjectCode(lambda file: file == __file__), Gates())
asyncio.set_event_loop(loop)
signal.signal(signal.SIGURG, interrupt)
signals = HostSignals(loop)
parent, called = os.getpid(), []
beats, copies = os.memfd_create("beats"), os.memfd_create("copies")
runs = [GatedRun(Claim(uuid.uuid4(), 1), Slot()) for _ in range(2)]
mine, neighbour = runs

def fork(*_):
    called.append(GatedRun.current())
    if not os.fork():
        os.write(copies, b"copied")

def fail(*_):
    called.append(GatedRun.current())
    raise ValueError("of a handler")

async def beat(seconds=0.001):
    """Wait and compute by turns, until the signal has been handled; then go on for a while."""
    left = 20
    while left:
        left -= bool(called)
        computes_until = time.monotonic() + 0.005
        while time.monotonic() < computes_until:
            os.write(beats, b"%d\\n" % os.getpid())
        await asyncio.sleep(seconds)

async def compute(handler):
    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    while not called:
        pass
    return "not reached by what it raised"

async def set_handler(handler, seconds=0.02):
    assert signal.signal(signal.SIGALRM, handler) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGALRM) is handler
    assert signal.signal(signal.SIGALRM, handler) is handler
    assert signal.signal(signal.SIGUSR2, signal.SIG_IGN) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGUSR2) == signal.SIG_IGN
    signal.setitimer(signal.ITIMER_REAL, seconds)

async def add_handler(handler):
    loop.add_signal_handler(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.02)

async def set_and_beat(setting):
    await loop.create_task(setting, context=mine.context)
    await asyncio.gather(loop.create_task(beat(), context=neighbour.context), beat(0.01))

async def take_what_others_need():
    assert signal.signal(signal.SIGURG, signal.SIG_IGN) is interrupt
    assert signal.signal(signal.SIGURG, fork) is interrupt
    faulthandler.register(signal.SIGURG, chain=False)
    assert signal.signal(signal.SIGCHLD, signal.SIG_IGN) == signal.SIG_DFL
    for number in (signal.SIGPIPE, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)

def descend(depth):
    return depth and descend(depth - 1)

def compute_until(is_over):
    while not is_over.is_set():
        descend(50)

async def dump_often(path):
    # Each dump reads the frames of threads that go on.
    is_over = threading.Event()
    sys.setswitchinterval(0.0001)
    for _ in range(4):
        threading.Thread(target=compute_until, args=(is_over,)).start()
    with path.open("w+") as file:
        faulthandler.dump_traceback_later(0.0005, repeat=True, file=file)
        while path.stat().st_size < 4_000_000:  # hundreds
            await asyncio.gather(*(asyncio.sleep(0) for _ in range(20)))
        faulthandler.cancel_dump_traceback_later()
        is_over.set()
        begin = path.read_text()[:20_000]
        assert begin.startswith("Timeout (0:00:00.000500)!") and "in descend" in begin
    for wrong in (0, -1):
        try:
            faulthandler.dump_traceback_later(wrong)
        except ValueError:
            called.append(wrong)

async def exit_later():
    faulthandler.dump_traceback_later(0.001, exit=True)
    await asyncio.sleep(0.05)

async def set_both():
    signal.signal(signal.SIGUSR1, note)
    loop.add_signal_handler(signal.SIGUSR2, note)
    signal.setitimer(signal.ITIMER_VIRTUAL, 1000)

async def set_alarm():
    signal.alarm(1000)

def note(*_):
    called.append(GatedRun.current())

def pids():
    os.lseek(beats, 0, os.SEEK_SET)
    return set(os.read(beats, 10_000_000).split())

def assert_copy_has_ended():
    pid, status = os.wait()
    assert os.waitstatus_to_exitcode(status) == 1
    assert os.fstat(copies).st_size == len("copied")
    assert pids() == {b"%d" % parent}, pids()
    assert called == [mine], called

def play(name):
    if name == "fork":
        loop.run_until_complete(set_and_beat(set_handler(fork)))
        assert_copy_has_ended()
    elif name == "fork_of_loop":
        loop.run_until_complete(set_and_beat(add_handler(fork)))
        assert_copy_has_ended()
    elif name == "raises":
        loop.run_until_complete(set_and_beat(set_handler(fail)))
        assert called == [mine]
    elif name == "raises_in_its_run":
        task = loop.create_task(compute(fail), context=mine.context)
        loop.run_until_complete(asyncio.wait([task]))
        assert isinstance(task.exception(), ValueError)
    elif name == "no_handler":
        signal.setitimer(signal.ITIMER_REAL, 0.001)
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGRTMIN)
        loop.run_until_complete(loop.create_task(exit_later(), context=mine.context))
        assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL
    elif name == "programs_and_copies":
        done = subprocess.run([sys.executable, "-c", RAISE])
        pid = os.fork()
        if not pid:
            signal.raise_signal(signal.SIGALRM)
            os._exit(0)
        assert done.returncode == os.waitstatus_to_exitcode(os.wait()[1]) == -signal.SIGALRM
    elif name == "default_set_again":
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.raise_signal(signal.SIGALRM)
    elif name == "tracebacks":
        dumping = dump_often(Path(__file__).with_name("dumped"))
        loop.run_until_complete(loop.create_task(dumping, context=mine.context))
        assert called == [0, -1]
    elif name == "needed":
        loop.run_until_complete(loop.create_task(take_what_others_need(), context=mine.context))
        signal.raise_signal(signal.SIGURG)
        assert called == ["interrupt"], called
        assert subprocess.run(["sh", "-c", "exit 7"]).returncode == 7
    elif name == "end_of_a_neighbour":
        both = set_both()
        loop.run_until_complete(loop.create_task(both, context=mine.context))
        loop.run_until_complete(loop.create_task(set_alarm(), context=neighbour.context))
        signals.restore_after(neighbour)
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
        assert signal.getitimer(signal.ITIMER_VIRTUAL) != (0, 0)
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            signal.raise_signal(number)
        loop.run_until_complete(asyncio.sleep(0.01))
        assert called == [mine, mine], called
        signals.restore_after(mine)
        assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            signal.raise_signal(number)
        loop.run_until_complete(asyncio.sleep(0.01))
        assert called == [mine, mine], called
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    elif name == "frozen":
        setting = set_handler(fail, 0)
        loop.run_until_complete(loop.create_task(setting, context=mine.context))
        mine.freeze()
        signal.raise_signal(signal.SIGALRM)
        assert called == []

if __name__ == "__main__":
    play(sys.argv[1])
    print("done", flush=True)
'''


def play(tmp_path, name):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, program, name], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "done\n", done.stdout + done.stderr
    return done.stderr


@pytest.mark.parametrize("name", ["fork", "fork_of_loop", "raises", "raises_in_its_run", "frozen"])
def test_a_handler_is_called_as_code_of_the_run_that_has_set_it(tmp_path, name):
    play(tmp_path, name)


def test_a_signal_without_a_handler_does_not_end_the_host(tmp_path):
    said = play(tmp_path, "no_handler")
    assert f"ignored signal {signal.SIGALRM:d}" in said
    assert "Timeout (0:00:00.001000)!" in said  # what `faulthandler` writes
    assert f"ignored signal {signal.SIGALRM:d}" in play(tmp_path, "default_set_again")


def test_a_run_cannot_take_the_signals_that_others_need(tmp_path):
    said = play(tmp_path, "needed")
    assert said.count("ignored a handler of run") == 3
    assert f"ignored faulthandler.register() for signal {signal.SIGURG:d}" in said


def test_tracebacks_are_dumped_without_a_segmentation_fault(tmp_path):
    play(tmp_path, "tracebacks")


def test_a_signal_ends_the_programs_and_copies_that_a_run_starts(tmp_path):
    play(tmp_path, "programs_and_copies")


def test_the_end_of_a_run_takes_its_own_handlers_and_timers_alone(tmp_path):
    play(tmp_path, "end_of_a_neighbour")
