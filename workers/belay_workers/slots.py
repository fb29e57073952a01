"""Memory shared by a worker's supervisor and its child processes: which process has which run.

A child process has one slot. A host has one for itself, and takes another for each of its runs. The
process writes its state and the supervisor writes its stop requests. Neither waits for the other,
and a slot can still be read when its process is dead. Every field is an aligned machine word (an id
takes two). The phase is written last, so a reader that sees RUNNING also sees the run it belongs
to. Before a kill, the supervisor stops the process (SIGSTOP) and reads the slot again.
"""

from __future__ import annotations

import ctypes
import enum
import fcntl
import mmap
import os
import struct
import tempfile
import time
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

from belay_server.domain.runs import Claim
from belay_workers.counters import Counters, CounterTable


class Phase(enum.IntEnum):
    """The phases of a child's work on the run in its slot. IDLE: it has no run."""

    IDLE = 0
    #: The child is claiming a run; the claim may or may not have been committed.
    CLAIMING = 1
    RUNNING = 2
    #: The graph has stopped; the run's end is being written.
    FINISHING = 3


class StopReason(enum.IntEnum):
    """The reason of the supervisor's request to stop a run. NONE: there is no request."""

    NONE = 0
    CANCEL = 1
    TIMEOUT = 2
    DRAIN = 3
    LEASE_LOST = 4


class Kind(enum.IntEnum):
    """What has a slot: a child process with a run of its own, a host, or a run of a host."""

    CHILD = 0
    HOST = 1
    HOSTED_RUN = 2


class _Record(ctypes.Structure):
    _fields_ = [
        ("pid", ctypes.c_int64),
        ("kind", ctypes.c_int64),
        ("phase", ctypes.c_int64),
        ("claim_no", ctypes.c_int64),
        ("run_id", ctypes.c_uint64 * 2),
        ("thread_id", ctypes.c_uint64 * 2),
        ("deadline", ctypes.c_double),
        ("claimed_at", ctypes.c_double),
        ("attempt", ctypes.c_int64),
        ("graph", ctypes.c_int64),
        ("stepping_since", ctypes.c_double),
        ("left_at", ctypes.c_double),
        ("worn_at", ctypes.c_double),
        ("ask_interrupts", ctypes.c_int64),
        ("ask_reason", ctypes.c_int64),
        ("ask_claim_no", ctypes.c_int64),
        ("ask_run_id", ctypes.c_uint64 * 2),
        ("canary", ctypes.c_int64),
        ("canary_inode", ctypes.c_uint64),
    ]


#: The words of a record. Many records are unpacked in a third of the time of reading each field.
_WORDS = struct.Struct("=4q 4Q 2d 2q 3d 3q 2Q q Q")
_HALF = (1 << 64) - 1
#: Graphs of a project that can be isolated: those with a lower position.
_MOST_GRAPHS = 4096
_WORD = ctypes.sizeof(ctypes.c_int64)
#: Bytes before the records: whether the worker drains, when it was supervised, and a byte for each
#: graph that can be isolated.
_HEADER = 2 * _WORD + _MOST_GRAPHS


def _write_id(field: ctypes.Array[ctypes.c_uint64], value: UUID) -> None:
    field[0], field[1] = value.int >> 64, value.int & _HALF


def _read_id(field: ctypes.Array[ctypes.c_uint64]) -> UUID:
    return _id(field[0], field[1])


@lru_cache(4096)
def _id(high: int, low: int) -> UUID:
    return UUID(int=(high << 64) | low)


class Reading(NamedTuple):
    """The content of a slot at one moment. Times are monotonic seconds, 0 for none."""

    #: The slot's position.
    slot: int
    pid: int
    kind: Kind
    phase: Phase
    run_id: UUID
    thread_id: UUID
    claim_no: int
    deadline: float
    claimed_at: float
    attempt: int
    #: The position of the run's graph among the graphs of the project.
    graph: int = 0
    #: Of a hosted run: since when the host's event loop executes one step of its code, and since
    #: when only threads or processes of it are left, although it was frozen (`host/gates.py`).
    stepping_since: float = 0.0
    left_at: float = 0.0
    #: Of a host: when it froze a run; it takes no further ones since then.
    worn_at: float = 0.0
    #: A file descriptor that the child keeps open, and its inode; see `Stopper`. -1 for none.
    canary: int = -1
    canary_inode: int = 0

    @property
    def claim(self) -> Claim:
        return Claim(self.run_id, self.claim_no)

    @property
    def is_busy(self) -> bool:
        return self.phase in _BUSY


_BUSY = (Phase.RUNNING, Phase.FINISHING)
_PHASES, _KINDS = tuple(Phase), tuple(Kind)
#: The positions of words in a record.
_PID, _PHASE, _CLAIM_NO, _RUN_ID = 0, 2, 3, slice(4, 6)


def _reading(slot: int, words: tuple[Any, ...]) -> Reading:
    pid, kind, phase, claim_no, run_high, run_low, thread_high, thread_low, *rest = words
    deadline, claimed_at, attempt, graph, stepping_since, left_at, worn_at, *rest = rest
    *_of_stops, canary, inode = rest
    return Reading(
        slot,
        pid,
        _KINDS[kind],
        _PHASES[phase],
        _id(run_high, run_low),
        _id(thread_high, thread_low),
        claim_no,
        deadline,
        claimed_at,
        attempt,
        graph,
        stepping_since,
        left_at,
        worn_at,
        canary,
        inode,
    )


class Slot:
    """The child's side of its slot."""

    def __init__(self, record: _Record, counters: Counters) -> None:
        self._record = record
        self.counters = counters

    def keeps_open(self, descriptor: int) -> None:
        """Record a descriptor that stays open for as long as the child's connections do."""
        self._record.canary_inode = os.fstat(descriptor).st_ino
        self._record.canary = descriptor

    def claiming(self, run_id: UUID) -> None:
        _write_id(self._record.run_id, run_id)
        self._record.claim_no = 0
        self._record.phase = Phase.CLAIMING

    def running(
        self, claim: Claim, thread_id: UUID, deadline: float, attempt: int = 1, graph: int = 0
    ) -> None:
        _write_id(self._record.thread_id, thread_id)
        self._record.graph = graph
        self._record.deadline = deadline
        self._record.claimed_at = time.monotonic()
        self._record.attempt = attempt
        self._record.claim_no = claim.claim_no
        self._record.phase = Phase.RUNNING

    def seconds_since_claim(self) -> float:
        return time.monotonic() - float(self._record.claimed_at)

    def finishing(self) -> None:
        self._record.phase = Phase.FINISHING

    def stopping(self) -> None:
        """Note that code of the run may be executed again, until it has been stopped."""
        self._record.phase = Phase.RUNNING

    def idle(self) -> None:
        self._record.phase = Phase.IDLE

    def release(self) -> None:
        """Give the slot of a hosted run back, whose host goes on."""
        self._record.phase = Phase.IDLE
        self._record.pid = 0

    def stepping(self, since: float) -> None:
        """Note that the event loop executes code of this run; 0 when it has stopped."""
        self._record.stepping_since = since

    def note_worn(self) -> None:
        """Note that this host has frozen a run."""
        if not self._record.worn_at:
            self._record.worn_at = time.monotonic()

    def note_left_threads(self) -> None:
        """Note that threads or processes are all that is left of this run, which was frozen."""
        if not self._record.left_at:
            self._record.left_at = time.monotonic()

    def asked(self, claim: Claim) -> StopReason:
        """Return the reason why this claim was asked to stop; NONE if it was not."""
        if self._record.ask_claim_no != claim.claim_no:
            return StopReason.NONE
        if _read_id(self._record.ask_run_id) != claim.run_id:
            return StopReason.NONE
        return StopReason(self._record.ask_reason)

    def is_interrupted(self, claim: Claim) -> bool:
        """Return whether the code of this claim is to be interrupted where it is."""
        return bool(self._record.ask_interrupts) and self.asked(claim) is not StopReason.NONE


class SlotTable:
    """All slots of a worker. Created in the parent process before it forks."""

    def __init__(self, size: int) -> None:
        # An unlinked file that exists for as long as the worker: it is the shared memory, and the
        # lock is taken on it.
        descriptor, path = tempfile.mkstemp(prefix="belay-slots-")
        Path(path).unlink()
        os.truncate(descriptor, _HEADER + size * ctypes.sizeof(_Record))
        self._map(descriptor, size)
        self.note_supervised()

    @classmethod
    def of_descriptor(cls, descriptor: int) -> SlotTable:
        """Return the slots of another process, whose `fileno` this process has inherited. Their
        counters are not shared."""
        table = cls.__new__(cls)
        size = (os.fstat(descriptor).st_size - _HEADER) // ctypes.sizeof(_Record)
        table._map(descriptor, size)
        return table

    def _map(self, descriptor: int, size: int) -> None:
        self.counter_table = CounterTable(size + 1)
        #: The row of the parent process.
        self.counters = self.counter_table.row(size)
        self._fd = descriptor
        self._memory = mmap.mmap(self._fd, _HEADER + size * ctypes.sizeof(_Record))
        self._draining = ctypes.c_int64.from_buffer(self._memory, 0)
        #: When the supervisor was last known to be executed, in monotonic seconds.
        self._supervised_at = ctypes.c_double.from_buffer(self._memory, _WORD)
        #: Which graphs need a process for each run, by position; see `placement.py`.
        self._isolated = (ctypes.c_uint8 * _MOST_GRAPHS).from_buffer(self._memory, 2 * _WORD)
        self._records = [
            _Record.from_buffer(self._memory, _HEADER + i * ctypes.sizeof(_Record))
            for i in range(size)
        ]

    def note_supervised(self) -> None:
        """Note that the supervisor is executed."""
        self._supervised_at.value = time.monotonic()

    @property
    def unsupervised_seconds(self) -> float:
        """Return for how long the supervisor has not been executed."""
        return time.monotonic() - float(self._supervised_at.value)

    @property
    def draining(self) -> bool:
        """True once the worker claims no more runs."""
        return bool(self._draining.value)

    def start_draining(self) -> None:
        self._draining.value = 1

    def isolate(self, graph: int) -> bool:
        """Let the runs of a graph have a process each from now on. Return False if they had."""
        if graph >= _MOST_GRAPHS or self._isolated[graph]:
            return False
        self._isolated[graph] = 1
        return True

    def share_again(self, graph: int) -> None:
        """Let the runs of a graph share hosts again."""
        self._isolated[graph] = 0

    def isolated(self) -> list[int]:
        """Return the positions of the graphs that have been isolated."""
        flags = bytes(self._isolated)
        found = [flags.find(1)]
        while found[-1] != -1:
            found.append(flags.find(1, found[-1] + 1))
        return found[:-1]

    def take(self, kind: Kind = Kind.CHILD) -> Slot:
        """Return a free slot for this process. Raises RuntimeError when there is none.

        The lock belongs to the process and ends with it, so a child killed here leaves no lock.
        """
        fcntl.lockf(self._fd, fcntl.LOCK_EX)
        try:
            for index, record in enumerate(self._records):
                if record.pid == 0:
                    ctypes.memset(ctypes.addressof(record), 0, ctypes.sizeof(record))
                    record.kind = kind
                    record.canary = -1
                    record.pid = os.getpid()
                    return Slot(record, self.counter_table.row(index))
        finally:
            fcntl.lockf(self._fd, fcntl.LOCK_UN)
        raise RuntimeError("no free slot for this child process")

    def free(self, index: int) -> None:
        """Free the slot of a dead child. Call it after the slot has been read."""
        self._records[index].phase = Phase.IDLE
        self._records[index].pid = 0

    def free_all(self, pid: int) -> None:
        """Free the slots of a dead process. Call it after they have been read."""
        for index, record in enumerate(self._records):
            if record.pid == pid:
                self.free(index)

    def read(self, slot: int) -> Reading:
        """Return the content of a slot."""
        return _reading(slot, _WORDS.unpack_from(self._memory, _HEADER + slot * _WORDS.size))

    def fileno(self) -> int:
        return self._fd

    def pids(self) -> list[int]:
        """Return the ids of the processes that have a slot."""
        return list({record.pid for record in self._records if record.pid != 0})

    def read_all(self) -> list[Reading]:
        """Return the content of every slot that is taken. A run that starts meanwhile may be read
        in part: what is done about it is for a claim, which its process compares."""
        records = enumerate(_WORDS.iter_unpack(self._memory[_HEADER:]))
        return [_reading(slot, words) for slot, words in records if words[_PID]]

    def busy_claims(self) -> list[Claim]:
        """Return the claims of the runs that are executed, or whose ends are being written."""
        records = _WORDS.iter_unpack(self._memory[_HEADER:])
        busy = [words for words in records if words[_PID] and words[_PHASE] in _BUSY]
        return [Claim(_id(*words[_RUN_ID]), words[_CLAIM_NO]) for words in busy]

    def busy(self) -> int:
        """Return how many runs are executed or being claimed."""
        return sum(record.pid != 0 and record.phase != Phase.IDLE for record in self._records)

    def ask(
        self, index: int, claim: Claim, reason: StopReason, *, interrupts: bool = False
    ) -> None:
        """Write a stop request for a claim. The caller sends the signal afterwards."""
        record = self._records[index]
        record.ask_claim_no = 0
        record.ask_interrupts = interrupts
        record.ask_reason = reason
        _write_id(record.ask_run_id, claim.run_id)
        record.ask_claim_no = claim.claim_no
