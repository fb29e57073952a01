"""The short form of the fault suite, and tests of its checker."""

from __future__ import annotations

import pytest

from tests.faults.history import Beat, Checker, Fault
from tests.faults.load import Promise
from tests.faults.monkey import WEIGHTS, play

LEASES = {"BELAY_LEASE_SECONDS": "4", "BELAY_LEASE_RENEWAL_SECONDS": "1"}


@pytest.mark.long
def test_random_faults_neither_lose_nor_duplicate_runs(scratch):
    """Run the monkey briefly; `make faults` is the long form."""
    report = play(
        scratch / "monkey",
        seed=20,
        seconds=14,
        gap=0.9,
        clients=6,
        pause=0.2,
        workers=2,
        outages=(0.2, 1.0),
        **LEASES,
    )
    print(report.text())
    assert report.verdict.holds, report.text()
    assert report.runs >= 10
    assert sum(report.faults.values()) >= 5


@pytest.mark.long
def test_a_rolling_restart_neither_loses_nor_duplicates_runs(scratch):
    """Stop and start workers and web processes all the time; streams are resumed on another one."""
    stops = {kind: weight for kind, weight in WEIGHTS.items() if "SIGTERM" in kind}
    report = play(
        scratch / "rolling",
        seed=7,
        seconds=7,
        gap=1.0,
        clients=6,
        pause=0.2,
        weights=stops,
        workers=2,
        BELAY_DRAIN_GRACE_SECONDS="0.3",
    )
    print(report.text())
    assert report.verdict.holds, report.text()
    assert report.verdict.given_up == 0
    assert report.runs >= 10
    assert sum(report.faults.values()) >= 2


# -- the checker ---------------------------------------------------------------------------------


def promise(**changes) -> Promise:
    made = Promise("run-1", "thread-1", "a", "join", accepted_at=1.0, ended_at=10.0)
    made.answer = {"done": made.steps()}
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def beats(pid=1, attempt=1, t=2.0, steps=("s1", "s2", "s3", "s4"), tag="a") -> list[Beat]:
    made = []
    for step in steps:
        for event in ("start", "end"):
            made.append(Beat("run-1", tag, attempt, step, event, pid, t))
            t += 0.1
    return made


def verdict(promises, history, faults=(), status="success", done=None, thread="idle"):
    done = promises[0].steps() if done is None else done
    runs = {p.run_id: None if status is None else {"status": status} for p in promises}
    return Checker(promises, history, list(faults), runs, {"thread-1": (thread, done)}).check()


def test_the_checker_accepts_a_correct_run():
    assert verdict([promise()], beats()).holds


@pytest.mark.parametrize(
    ("found", "case"),
    [
        ("lost", {"status": "pending"}),
        ("lost", {"status": "running"}),
        ("lost", {"status": None}),
        ("lost", {"done": []}),
        ("lost", {"done": ["a:s1", "a:s2", "a:s3"]}),
        ("lost", {"promises": [promise(ended_at=None)]}),
        ("doubled", {"done": [*promise().steps(), *promise().steps()]}),
        ("doubled", {"history": [*beats(pid=1), *beats(pid=2, attempt=2, t=2.25)]}),
        ("broken", {"status": "error"}),
        ("broken", {"thread": "busy"}),
        ("broken", {"history": [*beats(), *beats(pid=2, attempt=2, t=20.0)]}),
        ("broken", {"history": [*beats(), *beats(pid=1, t=3.0, steps=("s4",))]}),
        ("broken", {"promises": [promise(kind="rollback", cancelled="rollback")]}),
        ("broken", {"promises": [promise(kind="stream", event_ids=["1-2", "1-2"])]}),
        ("broken", {"promises": [promise(kind="stream", event_ids=["1-1", "1-2"])]}),
    ],
)
def test_the_checker_classifies_each_violation(found, case):
    given = {"promises": [promise()], "history": beats(), **case}
    assert getattr(verdict(**given), found)


def test_the_checker_reports_what_a_rolled_back_run_left_behind():
    rolled_back = promise(kind="rollback", cancelled="rollback")
    assert verdict([rolled_back], beats(), status=None, done=[]).holds
    assert verdict([rolled_back], beats(), status=None).broken


def test_a_recovery_is_timed_from_the_fault_to_the_next_step():
    history = [*beats(pid=1, steps=("s1", "s2")), *beats(pid=2, attempt=2, t=3.0)]
    history = [b for b in history if (b.pid, b.node) not in ((2, "s1"),)]
    fault = Fault("child killed", 2.5, 2.5, (1,))
    found = verdict([promise()], sorted(history, key=lambda b: b.t), [fault])
    assert found.holds
    assert found.executed_again == 1
    assert found.recoveries["child killed"] == [pytest.approx(0.7)]
    assert found.repeated_steps == 1
