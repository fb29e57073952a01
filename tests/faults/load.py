"""Clients of the fault suite: they retry as real callers do, and record what was promised to them
and what they observed. The same seed creates the same runs."""

from __future__ import annotations

import random
import threading
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

import httpx

#: The time after which a caller stops retrying a request; the checker then counts it as lost.
PATIENCE_SECONDS = 120.0
STEPS = ("s1", "s2", "s3", "s4")


@dataclass
class Promise:
    """An accepted run and the responses that its caller got."""

    run_id: str
    thread_id: str | None
    tag: str
    kind: str
    accepted_at: float = 0.0
    #: The action of an accepted cancel: "interrupt", "rollback" or None. `maybe_cancelled` is set
    #: if a response was lost and the retry found that the run had ended.
    cancelled: str | None = None
    maybe_cancelled: bool = False
    #: When the caller learned that the run had ended, and the values in the response.
    ended_at: float | None = None
    answer: Any = None
    event_ids: list[str] = field(default_factory=list)
    stream_ended: bool | None = None
    trouble: list[str] = field(default_factory=list)

    def steps(self) -> list[str]:
        return [f"{self.tag}:{step}" for step in STEPS]


class Refused(Exception):
    """A response had a status that the caller did not expect."""


class Caller:
    """A client of several web processes, any of which may be unavailable."""

    def __init__(self, urls: list[str], rng: random.Random) -> None:
        self.urls = urls
        self.rng = rng
        #: The number of requests that the last call made.
        self.tries = 0
        # A pool would keep dead connections, so each call opens a new one.
        self.timeout = httpx.Timeout(30.0, connect=2.0)

    def ask(
        self, method: str, path: str, *, ok: tuple[int, ...] = (200,), **options: Any
    ) -> httpx.Response:
        """Send a request; retry on 503 and lost connections, as through a load balancer."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        self.tries = 0
        while True:
            self.tries += 1
            try:
                answer = httpx.request(
                    method, self.rng.choice(self.urls) + path, timeout=self.timeout, **options
                )
                if answer.status_code in ok:
                    return answer
                if answer.status_code != 503:
                    raise Refused(f"{method} {path}: {answer.status_code} {answer.text[:300]}")
                assert answer.headers["retry-after"]
            except (httpx.TransportError, httpx.DecodingError):
                pass
            if time.monotonic() > deadline:
                raise Refused(f"{method} {path}: no answer for {PATIENCE_SECONDS} s")
            time.sleep(self.rng.uniform(0.05, 0.4))


class Client:
    """Creates runs of all kinds until it is stopped."""

    def __init__(
        self,
        number: int,
        seed: int,
        urls: list[str],
        history: str,
        shared_threads: list[str],
        stop: threading.Event,
        pause: float,
    ) -> None:
        self.runner = threading.Thread(target=self._run, name=f"client-{number}", daemon=True)
        self.rng = random.Random(f"{seed}/{number}")
        self.number = number
        self.caller = Caller(urls, self.rng)
        self.history = history
        self.shared_threads = shared_threads
        self.stop = stop
        self.pause = pause
        self.promises: list[Promise] = []
        self.asked = 0
        self.failure: BaseException | None = None

    KINDS = (
        ("wait", 20),
        ("join", 20),
        ("stream", 15),
        ("stateless", 10),
        ("queue", 10),
        ("shared", 10),
        ("interrupt", 6),
        ("rollback", 6),
        ("fails", 4),
        ("delayed", 4),
    )

    def _run(self) -> None:
        kinds, weights = zip(*self.KINDS, strict=True)
        try:
            while not self.stop.is_set():
                kind = self.rng.choices(kinds, weights)[0]
                getattr(self, kind)()
                self.stop.wait(self.rng.uniform(0, 2 * self.pause))
        except BaseException as error:
            self.failure = error

    # -- what every kind needs -------------------------------------------------------------------

    def thread(self) -> str:
        thread_id = str(uuid.UUID(int=self.rng.getrandbits(128), version=4))
        body = {"thread_id": thread_id, "if_exists": "do_nothing"}
        self.caller.ask("POST", "/threads", json=body)
        return thread_id

    def promise(self, kind: str, thread_id: str | None) -> Promise:
        self.asked += 1
        run_id = str(uuid.UUID(int=self.rng.getrandbits(128), version=4))
        return Promise(run_id, thread_id, f"c{self.number}-{self.asked}", kind)

    def body(self, promise: Promise, **options: Any) -> dict[str, Any]:
        given = {
            "tag": promise.tag,
            "history": self.history,
            "seconds": self.rng.choice((0.0, 0.02, 0.1, 0.3)),
            "fails": promise.kind == "fails",
        }
        return {
            "assistant_id": self.rng.choice(("probe", "sync_probe")),
            "input": given,
            "run_id": promise.run_id,
            "durability": "sync",
            "stream_mode": ["values", "updates"],
            "stream_resumable": True,
            **options,
        }

    def create(self, promise: Promise, **options: Any) -> None:
        """Send the create until it is accepted; the `run_id` is the same in every try."""
        path = f"/threads/{promise.thread_id}/runs"
        answer = self.caller.ask("POST", path, json=self.body(promise, **options))
        assert answer.json()["run_id"] == promise.run_id
        self.accepted(promise)

    def accepted(self, promise: Promise) -> None:
        promise.accepted_at = time.monotonic()
        self.promises.append(promise)

    def outcome(self, promise: Promise) -> None:
        path = f"/threads/{promise.thread_id}/runs/{promise.run_id}/join"
        answer = self.caller.ask("GET", path, ok=(200, 404))
        promise.ended_at = time.monotonic()
        promise.answer = answer.json()

    # -- the kinds -------------------------------------------------------------------------------

    def wait(self) -> None:
        promise = self.promise("wait", self.thread())
        path = f"/threads/{promise.thread_id}/runs/wait"
        answer = self.caller.ask("POST", path, json=self.body(promise))
        self.accepted(promise)
        promise.ended_at, promise.answer = time.monotonic(), answer.json()

    def join(self) -> None:
        promise = self.promise("join", self.thread())
        self.create(promise)
        self.outcome(promise)

    def fails(self) -> None:
        promise = self.promise("fails", self.thread())
        self.create(promise)
        self.outcome(promise)

    def delayed(self) -> None:
        promise = self.promise("delayed", self.thread())
        self.create(promise, after_seconds=1)
        self.outcome(promise)

    def stateless(self) -> None:
        promise = self.promise("stateless", None)
        body = self.body(promise)
        key = body.pop("run_id")
        answer = self.caller.ask("POST", "/runs/wait", json=body, headers={"Idempotency-Key": key})
        promise.run_id = answer.headers["content-location"].rpartition("/")[2]
        self.accepted(promise)
        promise.ended_at, promise.answer = time.monotonic(), answer.json()

    def queue(self) -> None:
        thread_id = self.thread()
        promises = [self.promise("queue", thread_id) for _ in range(3)]
        for promise in promises:
            self.create(promise)
        for promise in promises:
            self.outcome(promise)

    def shared(self) -> None:
        promise = self.promise("shared", self.rng.choice(self.shared_threads))
        self.create(promise)
        self.outcome(promise)

    def interrupt(self) -> None:
        self.cancel("interrupt")

    def rollback(self) -> None:
        self.cancel("rollback")

    def cancel(self, action: str) -> None:
        promise = self.promise(action, self.thread())
        self.create(promise)
        time.sleep(self.rng.uniform(0, 0.6))
        path = f"/threads/{promise.thread_id}/runs/{promise.run_id}"
        answer = self.caller.ask("POST", f"{path}/cancel?action={action}&wait=1", ok=(200, 404))
        if answer.status_code == 200:
            promise.cancelled = action
        else:
            # The run had ended before, or a response was lost and the retry found it ended.
            promise.maybe_cancelled = self.caller.tries > 1
        promise.ended_at = time.monotonic()
        self.outcome(promise)

    def stream(self) -> None:
        """Follow the run to its end; join again from the last id when the stream is cut."""
        promise = self.promise("stream", self.thread())
        self.create(promise)
        path = f"/threads/{promise.thread_id}/runs/{promise.run_id}/stream"
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            try:
                if self.read_stream(promise, path):
                    promise.stream_ended = True
                    break
            except httpx.TransportError:
                pass
            time.sleep(self.rng.uniform(0.02, 0.2))
        self.outcome(promise)

    def read_stream(self, promise: Promise, path: str) -> bool:
        """Read on from the last id. Return True if the run has ended."""
        url = self.rng.choice(self.caller.urls) + path
        headers = {"Last-Event-ID": promise.event_ids[-1] if promise.event_ids else "-1"}
        with httpx.stream("GET", url, headers=headers, timeout=self.caller.timeout) as answer:
            if answer.status_code != 200:
                return False
            for line in answer.iter_lines():
                if line.startswith("id: "):
                    promise.event_ids.append(line.removeprefix("id: "))
        # A stopping server closes its streams cleanly too, so read the run's status.
        path = path.removesuffix("/stream")
        return self.caller.ask("GET", path).json()["status"] not in ("pending", "running")
