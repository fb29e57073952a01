"""Test that waits for a hanging server end, and that waits for a slow statement do not.

The code runs in a separate process that gevent has patched, as under gunicorn.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.long_forms import long_case

PROGRAM = """
from gevent import monkey

monkey.patch_all()

import sys
import threading
import time

from belay_server.db.postgres.hang_watch import Hung, HangWatch

answers = sys.argv[1] == "answers"


class Connection:
    closed = False

    def close(self):
        self.closed = True


asked = threading.Event()


def ask():
    asked.set()
    return answers


watch = HangWatch(ask, patience_seconds=0.2)
told = []


def use(seconds, name):
    conn = Connection()
    try:
        with watch.watched(conn):
            threading.Event().wait(seconds)
        told.append((name, "done", conn.closed))
    except Hung:
        told.append((name, "ended", conn.closed))


long = threading.Thread(target=use, args=(60 if not answers else 3, "long"))
long.start()
use(0.05, "short")
long.join()
assert asked.is_set()
print(told)
"""


@pytest.mark.parametrize(
    ("server", "told"),
    [
        ("hangs", [("short", "done", False), ("long", "ended", True)]),
        long_case("answers", [("short", "done", False), ("long", "done", False)]),
    ],
)
def test_a_wait_is_ended_only_when_the_server_hangs(server, told):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, server],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.stdout.strip() == str(told), done.stderr
