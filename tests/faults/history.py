"""The checker: compares the probe's records, the responses to the callers and the final state of
the server, and lists every violated invariant (I1 to I9 of the fault matrix)."""

from __future__ import annotations

import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.load import Promise

ACTIVE = ("pending", "running")


@dataclass(frozen=True)
class Beat:
    """A line that the probe wrote."""

    run: str
    tag: str
    attempt: int
    node: str
    event: str
    pid: int
    t: float


@dataclass(frozen=True)
class Fault:
    """A fault that the monkey injected: when, until when, and into which processes."""

    kind: str
    began: float
    ended: float
    pids: tuple[int, ...] = ()


@dataclass
class Execution:
    """The beats of one attempt at a run in one process."""

    pid: int
    beats: list[Beat]

    @property
    def began(self) -> float:
        return self.beats[0].t

    @property
    def ended(self) -> float:
        return self.beats[-1].t


def read_beats(path: Path) -> list[Beat]:
    lines = path.read_text().splitlines() if path.exists() else []
    return sorted((Beat(**json.loads(line)) for line in lines), key=lambda beat: beat.t)


def executions(beats: Iterable[Beat]) -> dict[str, list[Execution]]:
    """Return the executions of each tag in the order in which they began."""
    found: dict[str, dict[tuple[int, int], Execution]] = defaultdict(dict)
    for beat in beats:
        key = (beat.pid, beat.attempt)
        found[beat.tag].setdefault(key, Execution(beat.pid, [])).beats.append(beat)
    return {tag: list(stretches.values()) for tag, stretches in found.items()}


@dataclass
class Verdict:
    """The findings of the checker. The lists are empty if all invariants hold."""

    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    repeated_steps: int = 0
    executed_again: int = 0
    given_up: int = 0
    recoveries: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    @property
    def holds(self) -> bool:
        return not (self.lost or self.doubled or self.broken)


class Checker:
    """Checks the invariants. `runs` and `threads` are the API's final responses: each run by its id
    (None for 404), each thread's status and `done` values by its id."""

    def __init__(
        self,
        promises: list[Promise],
        beats: list[Beat],
        faults: list[Fault],
        runs: Mapping[str, dict[str, Any] | None],
        threads: Mapping[str, tuple[str, list[str]]],
    ) -> None:
        self.promises = promises
        self.executions = executions(beats)
        self.beats = beats
        self.faults = faults
        self.runs = runs
        self.threads = threads
        self.paused = {pid for f in faults if f.kind == "worker paused" for pid in f.pids}
        self.verdict = Verdict()

    def check(self) -> Verdict:
        for promise in self.promises:
            self.verdict.given_up += self._was_given_up(promise)
            self._ended_once(promise)
            self._stayed_silent(promise)
            self._steps(promise)
            self._stream(promise)
        self._thread_states()
        self._one_at_a_time()
        self._recoveries()
        return self.verdict

    # I1, I4, I5: an accepted run is kept, a terminal status is final, a cancel takes effect.
    def _ended_once(self, promise: Promise) -> None:
        lost = self.verdict.lost
        if promise.ended_at is None:
            lost.append(f"{promise.tag} ({promise.kind}) never ended for its caller")
            return
        if promise.kind == "stateless":
            if promise.answer.get("done") != promise.steps() and not self._was_given_up(promise):
                lost.append(f"{promise.tag} answered {promise.answer}")
            return
        row = self.runs[promise.run_id]
        status = None if row is None else row["status"]
        if status in ACTIVE:
            lost.append(f"{promise.tag} ({promise.kind}) is still {status}")
        elif status not in self._may_end(promise):
            where = lost if status is None else self.verdict.broken
            where.append(f"{promise.tag} ({promise.kind}) ended {status}: {promise.answer}")
        elif status == "success" and promise.steps()[-1] not in promise.answer.get("done", []):
            self.verdict.broken.append(f"{promise.tag} success, but answered {promise.answer}")

    def _may_end(self, promise: Promise) -> set[str | None]:
        if promise.cancelled == "rollback":
            return {None}
        if promise.cancelled == "interrupt":
            return {"interrupted"}
        if self._was_given_up(promise):
            return {"error"}
        allowed: set[str | None] = {"error" if promise.kind == "fails" else "success"}
        if promise.maybe_cancelled:
            allowed |= {"interrupted"} if promise.kind == "interrupt" else {None}
        return allowed

    def _was_given_up(self, promise: Promise) -> bool:
        """Return whether the run failed because it was killed as often as the limit allows."""
        error = (promise.answer or {}).get("__error__") or {}
        return bool(error.get("error") == "MaxAttemptsExceeded")

    # I3: no node of the run executes after its end.
    def _stayed_silent(self, promise: Promise) -> None:
        if promise.ended_at is None:
            return
        late = [
            beat
            for execution in self.executions.get(promise.tag, ())
            for beat in execution.beats
            if beat.t > promise.ended_at and beat.event == "start" and beat.pid not in self.paused
        ]
        if late:
            self.verdict.broken.append(f"{promise.tag} went on after its end: {late}")

    # I7: with `sync` a step is executed again only if it was interrupted.
    def _steps(self, promise: Promise) -> None:
        stretches = self.executions.get(promise.tag, [])
        starts = Counter(b.node for e in stretches for b in e.beats if b.event == "start")
        again = sum(count - 1 for count in starts.values())
        cuts = max(0, len(stretches) - 1)
        self.verdict.repeated_steps += again
        self.verdict.executed_again += cuts
        if again > cuts:
            self.verdict.broken.append(f"{promise.tag} repeated {again} steps in {cuts} cuts")

    # I9: ids strictly increase, the stream ends.
    def _stream(self, promise: Promise) -> None:
        if promise.kind != "stream":
            return
        keys = [tuple(map(int, event_id.split("-"))) for event_id in promise.event_ids]
        if any(later <= earlier for earlier, later in itertools.pairwise(keys)):
            self.verdict.broken.append(f"{promise.tag} stream went back: {promise.event_ids}")
        if not promise.stream_ended:
            self.verdict.broken.append(f"{promise.tag} stream never ended")

    # I6, and the state: it has the steps of every successful run once and in order.
    def _thread_states(self) -> None:
        by_thread: dict[str, list[Promise]] = defaultdict(list)
        for promise in self.promises:
            if promise.thread_id is not None:
                by_thread[promise.thread_id].append(promise)
        for thread_id, promises in by_thread.items():
            status, done = self.threads[thread_id]
            if status == "busy":
                self.verdict.broken.append(f"thread {thread_id} is still busy")
            for promise in promises:
                self._state_of(promise, done)

    def _state_of(self, promise: Promise, done: list[str]) -> None:
        mine = [entry for entry in done if entry.startswith(f"{promise.tag}:")]
        row = self.runs[promise.run_id]
        status = None if row is None else row["status"]
        if len(mine) != len(set(mine)):
            self.verdict.doubled.append(f"{promise.tag} is in the state as {mine}")
        elif status == "success" and mine != promise.steps():
            self.verdict.lost.append(f"{promise.tag} is in the state as {mine}")
        elif status is None and mine:
            self.verdict.broken.append(f"{promise.tag} was rolled back, and left {mine}")
        elif mine != promise.steps()[: len(mine)]:
            self.verdict.broken.append(f"{promise.tag} is in the state as {mine}")

    # I2: no two processes execute one run at the same time.
    def _one_at_a_time(self) -> None:
        for tag, stretches in self.executions.items():
            for earlier, later in itertools.pairwise(stretches):
                if later.began < earlier.ended and earlier.pid not in self.paused:
                    self.verdict.doubled.append(f"{tag} was executed by two at once")

    def _recoveries(self) -> None:
        """Record the seconds from each fault to the next node start of the interrupted runs."""
        for stretches in self.executions.values():
            for earlier, later in itertools.pairwise(stretches):
                fault = self._that_cut(earlier, later)
                if fault is not None:
                    seconds = max(0.0, later.began - fault.began)
                    self.verdict.recoveries[fault.kind].append(seconds)
        for fault in self.faults:
            if not fault.pids:
                after = [b.t for b in self.beats if b.t >= fault.ended and b.event == "start"]
                if after:
                    self.verdict.recoveries[fault.kind].append(after[0] - fault.ended)

    def _that_cut(self, earlier: Execution, later: Execution) -> Fault | None:
        found = [
            fault
            for fault in self.faults
            if earlier.pid in fault.pids
            and fault.began <= later.began
            and fault.began >= earlier.began - 0.5
        ]
        return found[-1] if found else None
