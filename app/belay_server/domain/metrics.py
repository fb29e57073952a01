"""The metrics by name: what is counted, in which words, in which buckets. No I/O.

Both sides have some of them: a run that never started is cancelled by a web process, any other ends
in a worker. They have the same names, to be summed.
"""

from __future__ import annotations

from dataclasses import dataclass

from belay_server.domain.runs import RunStatus


@dataclass(frozen=True, slots=True)
class Counted:
    """A counter: its name (without `_total`), what it says, its label and the label's values."""

    name: str
    says: str
    label: str
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Timed:
    """A histogram of seconds."""

    name: str
    says: str
    label: str
    values: tuple[str, ...]
    buckets: tuple[float, ...]


#: What a run that was rolled back has for a status: its row is gone.
ROLLED_BACK = "rolled_back"
ENDED = (
    RunStatus.SUCCESS.value,
    RunStatus.ERROR.value,
    RunStatus.TIMEOUT.value,
    RunStatus.INTERRUPTED.value,
    ROLLED_BACK,
)

#: How a cancel ended: the run had not started; it stopped when it was asked; its child was killed;
#: its worker was gone, and another one wrote the end.
PENDING, ASKED, KILLED, RECOVERED = "pending", "asked", "killed", "recovered"

RUNS_ENDED = Counted("belay_runs_ended", "Runs that have ended, by status.", "status", ENDED)
CLAIM_LATENCY = Timed(
    "belay_claim_latency_seconds",
    "From when a run could start until its first claim; waiting for its thread counts.",
    "",
    ("",),
    (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800),
)
RUN_DURATION = Timed(
    "belay_run_duration_seconds",
    "From a run's claim to its end, by status; of the attempt that ended it.",
    "status",
    ENDED,
    (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800, 7200, 43200),
)
CANCEL_LATENCY = Timed(
    "belay_cancel_latency_seconds",
    "From an accepted cancel to the end it asked for, by how it ended.",
    "how",
    (PENDING, ASKED, KILLED, RECOVERED),
    (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)
LEASE_LOSSES = Counted(
    "belay_lease_losses",
    "Claims that ended without their worker: noticed by it, or taken from it by the sweeper.",
    "seen_by",
    ("owner", "sweeper"),
)
#: The items of the sweeper's loops.
LOST_RUNS, HIDDEN_THREADS, EXPIRED_THREADS = "lost_runs", "hidden_threads", "expired_threads"
SET_ASIDE = Counted(
    "belay_set_aside",
    "What failed five times and is set aside for an hour; the log says why.",
    "what",
    (LOST_RUNS, HIDDEN_THREADS, EXPIRED_THREADS),
)
CHILD_DEATHS = Counted(
    "belay_child_deaths",
    "Children that ended with a run in hand: killed by the supervisor, or by themselves.",
    "cause",
    ("killed", "died"),
)
