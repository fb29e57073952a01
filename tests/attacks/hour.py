"""`make attacks`: run the attacks with new seeds for a given time; stop at the first failure.

Three attacks alternate: operations of two tenants, bodies of random shape and size, and walks along
the links of the OpenAPI document. `/ok` is requested all the time.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import httpx

from tests.attacks import test_bodies, test_documents, test_tenants
from tests.attacks.conftest import watching, web_memory
from tests.servers import PROJECT, LiveServer

#: The most that the memory of the web processes may grow within an hour.
_MOST_GROWN = 300 * 1024 * 1024


def fuzz(server: LiveServer, chosen: random.Random) -> int:
    """Send bodies of one shape and size to some routes; return how many were sent."""
    shape, size = chosen.choice(test_bodies.SHAPES), int(10 ** chosen.uniform(1, 7.2))
    routes = chosen.sample(list(test_bodies.routes(server)), 5)
    sent = 0
    with httpx.Client(base_url=server.url, timeout=120) as client:
        for method, path in routes:
            for body in test_bodies.bodies(shape(size), chosen):
                headers = {"content-type": "application/json", "authorization": "Bearer eve"}
                answer = client.request(method, path, content=body, headers=headers)
                assert answer.status_code < 500, (method, path, shape.__name__, size, answer.text)
                sent += 1
    return sent


def attack(server: LiveServer, seconds: float, seed: int) -> Counter[str]:
    """Run all attacks until the time is over; return what was done, by kind."""
    done: Counter[str] = Counter()
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        seed += 1
        print(f"seed {seed} {dict(done)}", flush=True)
        test_tenants.play(server, seed, 300)
        done["tenants' steps"] += 300
        done["bodies"] += fuzz(server, random.Random(seed))
        done["walked"] += test_documents.walk(server, examples=10, steps=12, seed=seed)
    return done


def main() -> int:
    parser = argparse.ArgumentParser(description="The attacks, with new seeds.")
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="belay-attacks-", dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        server = LiveServer(Path(folder) / "data", config=PROJECT.parent / "with_auth.json").start()
        try:
            before = web_memory(server)
            with watching(server) as stalls:
                done = attack(server, asked.seconds, asked.seed)
            grown = web_memory(server) - before
            longest = sorted(stalls.seconds)[-5:]
            print(f"{dict(done)}; grown by {grown >> 20} MiB; longest /ok {longest}")
            return 0 if grown < _MOST_GROWN else 1
        finally:
            server.stop()


if __name__ == "__main__":
    sys.exit(main())
