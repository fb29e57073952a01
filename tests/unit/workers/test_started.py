"""What a run of a host has started is ended with it, and nothing that another run has started."""

from __future__ import annotations

import subprocess
import sys

import pytest

#: Replacing the functions that start processes concerns the whole process, so this is another one.
PROGRAM = '''
from belay_workers.host.replaceable_functions import make_replaceable
make_replaceable()
from _thread import start_new_thread
from os import fork, posix_spawn, system
import ctypes, multiprocessing, os, subprocess, sys, threading, time, uuid
import psutil
from belay_server.domain.runs import Claim
from belay_workers.host.gated_run import GatedRun
from belay_workers.host.started import Started
from belay_workers.supervision import processes

class Slot:
    def is_interrupted(self, claim):
        return False

def sleep():
    time.sleep(60)

def a_program():
    return subprocess.Popen(["sleep", "60"]).pid

def without_environment():
    return subprocess.Popen(["/bin/sleep", "60"], env={}).pid

def spawned():
    return os.posix_spawn("/bin/sleep", ["sleep", "60"], os.environ)

def forked():
    pid = os.fork()
    if pid == 0:
        sleep()
    return pid

def forked_by_name():
    pid = fork()
    if pid == 0:
        sleep()
    return pid

def with_system_by_name():
    assert os.waitstatus_to_exitcode(system("sleep 60 & exit 3")) == 3
    return new_child()

def on_a_thread_by_name():
    """Return while the call goes on."""
    found = []
    def call():
        found.append(subprocess.Popen(["sleep", "60"]))
        found[0].wait()
    start_new_thread(call, ())
    while not found:
        time.sleep(0.01)
    return found[0].pid

def a_copy_that_returns(run):
    """The copy would print what the parent prints."""
    def fork():
        return os.fork()
    pid = run.call(fork)
    assert os.getpid() == parent
    os.waitpid(pid, 0)
    return without_environment()

def spawned_without_environment():
    """Python 3.13 takes None for that of this process."""
    env = None if sys.version_info >= (3, 13) else os.environ
    return os.posix_spawn("/bin/sleep", ["sleep", "60"], env)

def with_putenv():
    """A program gets what `os.putenv` has set, which `os.environ` has not."""
    os.putenv("OF_PUTENV", "set")
    shell = ["sh", "-c", "echo $OF_PUTENV"]
    assert subprocess.run(shell, stdout=subprocess.PIPE, text=True).stdout == "set\\n"
    return a_program()

def beside_native_code(run):
    """What is not known as the run's is left at its normal end: it may be a neighbour's."""
    own = a_program()
    native = ctypes.CDLL(None).fork()
    if native == 0:
        os.execv("/bin/sleep", ["sleep", "60"])
    while started.end(run, is_stopped=False):
        time.sleep(0.01)
    assert (is_alive(own), is_alive(native)) == (False, True)
    os.kill(native, 9)
    os.waitpid(native, 0)
    return a_program()

def with_a_thread(method):
    """A thread that ends in a copy does not end the copy."""
    context = multiprocessing.get_context(method)
    goes_on = context.Event()
    process = context.Process(target=sleep_after_a_thread, args=(goes_on,))
    process.start()
    assert goes_on.wait(30)
    return process.pid

def sleep_after_a_thread(goes_on):
    thread = threading.Thread(target=bool)
    thread.start()
    thread.join()
    goes_on.set()
    sleep()

def of_multiprocessing(method):
    process = multiprocessing.get_context(method).Process(target=sleep)
    process.start()
    return process.pid

def on_a_thread(run):
    """Return while the call goes on."""
    found = []
    def call():
        found.append(subprocess.Popen(["sleep", "60"]))
        found[0].wait()
    threading.Thread(target=run.call, args=(call,)).start()
    while not found:
        time.sleep(0.01)
    return found[0].pid

def left_by_a_shell():
    """The shell ends, and this process becomes the parent of what it has started."""
    shell = ["sh", "-c", "sleep 60 > /dev/null & echo $!"]
    return int(subprocess.run(shell, stdout=subprocess.PIPE, text=True).stdout.split()[0])

def by_os_system():
    code = os.system("sleep 60 & exit 3")
    assert os.waitstatus_to_exitcode(code) == 3, code
    return new_child()

def new_child():
    left = [p for p in processes.child_processes(os.getpid()) if p not in seen]
    return left[0].pid

def is_alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False

KINDS = {
    "program": lambda run: a_program(),
    "without_environment": lambda run: without_environment(),
    "spawned": lambda run: spawned(),
    "spawned_without_environment": lambda run: spawned_without_environment(),
    "forked": lambda run: forked(),
    "spawn": lambda run: of_multiprocessing("spawn"),
    "forkserver": lambda run: of_multiprocessing("forkserver"),
    "with_putenv": lambda run: with_putenv(),
    "native": beside_native_code,
    "copied": a_copy_that_returns,
    "threaded": lambda run: with_a_thread("fork"),
    "on_a_thread": on_a_thread,
    "left_by_a_shell": lambda run: left_by_a_shell(),
    "by_os_system": lambda run: by_os_system(),
    "forked_by_name": lambda run: forked_by_name(),
    "spawned_by_name": lambda run: posix_spawn("/bin/sleep", ["sleep", "60"], os.environ),
    "with_system_by_name": lambda run: with_system_by_name(),
    "on_a_thread_by_name": lambda run: on_a_thread_by_name(),
}

if __name__ == "__main__":
    processes.become_reaper()
    parent = os.getpid()
    started = Started()
    seen = set()
    runs, pids = [], []
    for _ in range(2):
        run = GatedRun(Claim(uuid.uuid4(), 1), Slot())
        seen = processes.child_processes(os.getpid())
        pids.append(run.context.run(KINDS[sys.argv[1]], run))
        runs.append(run)
    for ended in (1, 0):
        while started.end(runs[ended], is_stopped=True):
            time.sleep(0.01)
        started.forget(runs[ended])
        print([is_alive(pid) for pid in pids], flush=True)
    os._exit(0)
'''

KINDS = [
    *("program", "without_environment", "spawned", "forked", "spawn", "forkserver"),
    "spawned_without_environment",
    *(
        "with_putenv",
        "native",
        "copied",
        "threaded",
        "on_a_thread",
        "left_by_a_shell",
        "by_os_system",
    ),
    *("forked_by_name", "spawned_by_name", "with_system_by_name", "on_a_thread_by_name"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_process_is_ended_with_the_run_that_has_started_it(tmp_path, kind):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, program, kind], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.splitlines() == ["[True, False]", "[False, False]"], done.stderr
