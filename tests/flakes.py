"""`make flakes`: run the quick suite again and again, half of the times beside busy processes.

A test that depends on how fast the machine is fails here sooner or later. Each run's result is
printed when it ends; the exit code is 1 if any of them failed.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from belay_server.dev.process_tree import die_with_parent

_SPIN = "while True: pass"


@contextmanager
def busy_machine(processes: int) -> Iterator[None]:
    """Keep so many cores busy."""
    with_me = die_with_parent(os.getpid(), signal.SIGKILL)
    command = [sys.executable, "-c", _SPIN]
    spinning = [subprocess.Popen(command, preexec_fn=with_me) for _ in range(processes)]
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--busy", type=int, default=os.cpu_count() or 1, help="busy processes")
    parser.add_argument("pytest", nargs="*", help="arguments for pytest")
    asked = parser.parse_args()
    command = [sys.executable, "-m", "pytest", "--dist", "loadfile", "--quiet", *asked.pytest]
    failed = 0
    for number in range(1, asked.times + 1):
        busy = asked.busy if number > asked.times // 2 else 0
        began = time.monotonic()
        with busy_machine(busy):
            done = subprocess.run(command, check=False, capture_output=True, text=True)
        minutes, seconds = divmod(round(time.monotonic() - began), 60)
        verdict = "passed" if done.returncode == 0 else "FAILED"
        print(
            f"run {number}, {busy} busy processes: {verdict} in {minutes}:{seconds:02}", flush=True
        )
        if done.returncode:
            failed += 1
            lines = (done.stdout + done.stderr).splitlines()
            kept = Path(tempfile.gettempdir()) / f"flakes-{os.getpid()}-{number}.log"
            kept.write_text("\n".join(lines))
            print("\n".join(lines[-40:]), f"the whole output: {kept}", sep="\n", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
