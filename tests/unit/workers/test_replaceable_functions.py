"""The functions that start processes can be replaced where they were imported by name."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import os, pickle, posix, _posixsubprocess, _thread, subprocess
from belay_workers.host.replaceable_functions import make_replaceable
found = make_replaceable()
from os import fork, system
from _thread import start_new_thread

class OfClass:
    fork = fork  # a builtin function is not bound to the object

assert make_replaceable() == found, "a second call changes nothing"
assert os.fork is posix.fork is found["fork"]
assert subprocess._fork_exec is _posixsubprocess.fork_exec is found["fork_exec"]
assert pickle.loads(pickle.dumps(system)) is system
assert system("exit 3") == 3 << 8
assert subprocess.run(["sh", "-c", "exit 4"]).returncode == 4
found["fork"].wrap(lambda before: lambda: ("replaced", before.__name__))
assert fork() == OfClass().fork() == ("replaced", "fork")
found["start_new_thread"].wrap(lambda _: lambda function, args: function(*args))
assert start_new_thread(max, (1, 2)) == 2
print("done")
"""


def test_functions_imported_by_name_are_replaced():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "done\n", done.stderr
