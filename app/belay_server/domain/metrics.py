"""Define the metrics: their names, help texts, labels and buckets. No I/O.

The web process and the worker share some of them: a run that never started is cancelled by a web
process, any other run ends in a worker. These have the same names, so that they can be summed.
"""

from __future__ import annotations

from dataclasses import dataclass

from belay_server.domain.runs import RunStatus

#: How the names of the metrics of LangGraph's server start.
REFERENCE_PREFIX = "lg_api_"


@dataclass(frozen=True, slots=True)
class Counted:
    """A counter: its name (without `_total`), help text (`says`), label and the label's values."""

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


#: The status label of a run that was rolled back. Its row is gone, so it has no status.
ROLLED_BACK = "rolled_back"
ENDED = (
    RunStatus.SUCCESS.value,
    RunStatus.ERROR.value,
    RunStatus.TIMEOUT.value,
    RunStatus.INTERRUPTED.value,
    ROLLED_BACK,
)

#: How a cancel ended: the run had not started; it stopped on request; its child process was killed;
#: its worker was lost, and another worker wrote the end.
PENDING, ASKED, KILLED, RECOVERED = "pending", "asked", "killed", "recovered"

RUNS_ENDED = Counted("belay_runs_ended", "Runs that have ended, by status.", "status", ENDED)
CLAIM_LATENCY = Timed(
    "belay_claim_latency_seconds",
    "Time from when a run may start to its first claim, including the wait for its thread.",
    "",
    ("",),
    (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800),
)
RUN_DURATION = Timed(
    "belay_run_duration_seconds",
    "Time from the claim of a run's last attempt to its end, by status.",
    "status",
    ENDED,
    (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800, 7200, 43200),
)
CANCEL_LATENCY = Timed(
    "belay_cancel_latency_seconds",
    "Time from an accepted cancel to the end of the run, by how it ended.",
    "how",
    (PENDING, ASKED, KILLED, RECOVERED),
    (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)
LEASE_LOSSES = Counted(
    "belay_lease_losses",
    "Leases lost by their worker: detected by the worker itself, or by the sweeper.",
    "seen_by",
    ("owner", "sweeper"),
)
#: The items of the sweeper's loops.
LOST_RUNS, HIDDEN_THREADS, EXPIRED_THREADS = "lost_runs", "hidden_threads", "expired_threads"
SET_ASIDE = Counted(
    "belay_set_aside",
    "Items that failed five times and are skipped for an hour; the log has the reason.",
    "what",
    (LOST_RUNS, HIDDEN_THREADS, EXPIRED_THREADS),
)
CHILD_DEATHS = Counted(
    "belay_child_deaths",
    "Child processes that ended during a run: killed by the supervisor, or for another reason.",
    "cause",
    ("killed", "died"),
)
