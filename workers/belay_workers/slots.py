"""Shared memory between a worker's supervisor and its children: who runs what.

One slot per child. The child writes what it is doing, the supervisor writes what it asks; neither
waits for the other, and a slot can still be read when its child is dead. Every field is an aligned
machine word (ids are two), and the phase is written last, so a reader that sees RUNNING sees the
run it belongs to. To be sure of it before a kill, the supervisor stops the child and reads again.
"""

from __future__ import annotations

import ctypes
import enum
import fcntl
import mmap
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from belay_server.domain.runs import Claim
from belay_workers.counters import Counters, CounterTable


class Phase(enum.IntEnum):
    IDLE = 0
    #: The claim may or may not have been committed.
    CLAIMING = 1
    RUNNING = 2
    #: The graph has stopped; its end is being written.
    FINISHING = 3


class StopReason(enum.IntEnum):
    NONE = 0
    CANCEL = 1
    TIMEOUT = 2
    DRAIN = 3
    LEASE_LOST = 4


class _Record(ctypes.Structure):
    _fields_ = [
        ("pid", ctypes.c_int64),
        ("phase", ctypes.c_int64),
        ("claim_no", ctypes.c_int64),
        ("run_id", ctypes.c_uint64 * 2),
        ("thread_id", ctypes.c_uint64 * 2),
        ("deadline", ctypes.c_double),
        ("claimed_at", ctypes.c_double),
        ("attempt", ctypes.c_int64),
        ("ask_reason", ctypes.c_int64),
        ("ask_claim_no", ctypes.c_int64),
        ("ask_run_id", ctypes.c_uint64 * 2),
        ("canary", ctypes.c_int64),
        ("canary_inode", ctypes.c_uint64),
    ]


_HALF = (1 << 64) - 1


def _write_id(field: ctypes.Array[ctypes.c_uint64], value: UUID) -> None:
    field[0], field[1] = value.int >> 64, value.int & _HALF


def _read_id(field: ctypes.Array[ctypes.c_uint64]) -> UUID:
    return UUID(int=(field[0] << 64) | field[1])


@dataclass(frozen=True, slots=True)
class Reading:
    """A slot at one moment. Times are on the monotonic clock, 0 for none."""

    index: int
    pid: int
    phase: Phase
    run_id: UUID
    thread_id: UUID
    claim_no: int
    deadline: float
    claimed_at: float
    attempt: int
    #: A descriptor of the child's that it keeps open, and what it is of; see `Stopper`.
    canary: int = -1
    canary_inode: int = 0

    @property
    def claim(self) -> Claim:
        return Claim(self.run_id, self.claim_no)

    @property
    def is_busy(self) -> bool:
        return self.phase in (Phase.RUNNING, Phase.FINISHING)


class Slot:
    """The child's own side of its slot."""

    def __init__(self, record: _Record, counters: Counters) -> None:
        self._record = record
        self.counters = counters

    def keeps_open(self, descriptor: int) -> None:
        """A child that has lost it has lost its connections, too."""
        self._record.canary_inode = os.fstat(descriptor).st_ino
        self._record.canary = descriptor

    def claiming(self, run_id: UUID) -> None:
        _write_id(self._record.run_id, run_id)
        self._record.claim_no = 0
        self._record.phase = Phase.CLAIMING

    def running(self, claim: Claim, thread_id: UUID, deadline: float, attempt: int = 1) -> None:
        _write_id(self._record.thread_id, thread_id)
        self._record.deadline = deadline
        self._record.claimed_at = time.monotonic()
        self._record.attempt = attempt
        self._record.claim_no = claim.claim_no
        self._record.phase = Phase.RUNNING

    def seconds_since_claim(self) -> float:
        return time.monotonic() - float(self._record.claimed_at)

    def finishing(self) -> None:
        self._record.phase = Phase.FINISHING

    def idle(self) -> None:
        self._record.phase = Phase.IDLE

    def asked(self, claim: Claim) -> StopReason:
        """What the supervisor asks of this very run, if anything."""
        if self._record.ask_claim_no != claim.claim_no:
            return StopReason.NONE
        if _read_id(self._record.ask_run_id) != claim.run_id:
            return StopReason.NONE
        return StopReason(self._record.ask_reason)


class SlotTable:
    """All slots of a worker. Made in the parent before it forks."""

    def __init__(self, size: int) -> None:
        self._size = size
        self.counter_table = CounterTable(size + 1)
        #: What the parent itself counts.
        self.counters = self.counter_table.row(size)
        self._header = ctypes.sizeof(ctypes.c_int64)
        length = self._header + size * ctypes.sizeof(_Record)
        # A nameless file that lives as long as the worker: memory to share, and a lock on it.
        self._fd, path = tempfile.mkstemp(prefix="belay-slots-")
        Path(path).unlink()
        os.truncate(self._fd, length)
        self._memory = mmap.mmap(self._fd, length)
        self._draining = ctypes.c_int64.from_buffer(self._memory, 0)
        self._records = [
            _Record.from_buffer(self._memory, self._header + i * ctypes.sizeof(_Record))
            for i in range(size)
        ]

    @property
    def draining(self) -> bool:
        """True once the worker takes no new runs."""
        return bool(self._draining.value)

    def start_draining(self) -> None:
        self._draining.value = 1

    def take(self) -> Slot:
        """A free slot for this process. Raises RuntimeError when there is none.

        The lock is per process and ends with it, so a child killed here leaves nothing locked.
        """
        fcntl.lockf(self._fd, fcntl.LOCK_EX)
        try:
            for index, record in enumerate(self._records):
                if record.pid == 0:
                    ctypes.memset(ctypes.addressof(record), 0, ctypes.sizeof(record))
                    record.pid = os.getpid()
                    return Slot(record, self.counter_table.row(index))
        finally:
            fcntl.lockf(self._fd, fcntl.LOCK_UN)
        raise RuntimeError("no free slot for this child process")

    def free(self, index: int) -> None:
        """Give back the slot of a dead child, once what it says has been read."""
        self._records[index].phase = Phase.IDLE
        self._records[index].pid = 0

    def read(self, index: int) -> Reading:
        record = self._records[index]
        return Reading(
            index=index,
            phase=Phase(record.phase),
            pid=record.pid,
            run_id=_read_id(record.run_id),
            thread_id=_read_id(record.thread_id),
            claim_no=record.claim_no,
            deadline=record.deadline,
            claimed_at=record.claimed_at,
            attempt=record.attempt,
            canary=record.canary,
            canary_inode=record.canary_inode,
        )

    def fileno(self) -> int:
        return self._fd

    def pids(self) -> list[int]:
        """Of the children that have a slot."""
        return [record.pid for record in self._records if record.pid != 0]

    def read_all(self) -> list[Reading]:
        """Every slot that a child has taken."""
        return [self.read(i) for i, record in enumerate(self._records) if record.pid != 0]

    def ask(self, index: int, claim: Claim, reason: StopReason) -> None:
        """Write what is asked, of which run. The signal follows."""
        record = self._records[index]
        record.ask_claim_no = 0
        record.ask_reason = reason
        _write_id(record.ask_run_id, claim.run_id)
        record.ask_claim_no = claim.claim_no
