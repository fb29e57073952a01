"""Create runs: make the decisions and the writes before the client gets a response."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import tenacity
import uuid_utils

from belay_server.configuration.settings import Settings
from belay_server.db import run_cancels as cancel_rows
from belay_server.db import run_claims as claim_rows
from belay_server.db import runs as run_rows
from belay_server.db import threads as thread_rows
from belay_server.db.assistants import keep_assistant
from belay_server.db.postgres.connection import Connection
from belay_server.db.runs import NewRun, Ringable
from belay_server.domain.access import EVERYTHING
from belay_server.domain.assistants import Assistant
from belay_server.domain.errors import (
    Conflict,
    Interrupted,
    InvalidRequest,
    NotFound,
    TooMany,
    TooMuch,
)
from belay_server.domain.run_options import MultitaskStrategy, RunOptions
from belay_server.domain.runs import CancelAction, Run, superseded_reason
from belay_server.domain.threads import ThreadDefaults
from belay_server.doorbell import Doorbell
from belay_server.graphs.registry import GraphRegistry
from belay_server.graphs.serde import to_json
from belay_server.runtime import fault_points
from belay_server.runtime.fault_points import FaultPoint
from belay_server.runtime.turns import yield_to_sockets
from belay_server.services.assistant_cache import resolve_assistant
from belay_server.services.parts import Parts, RunParts
from belay_server.services.runs.cancellation import (
    Cancelled,
    announce_cancelled,
    cancel_locked_runs,
)
from belay_server.services.runs.chosen_ids import drop_old_log
from belay_server.services.runs.kwargs import MergedRun, build_run_kwargs
from belay_server.services.size_limits import refuse_large, refuse_many_keys

log = logging.getLogger(__name__)

#: Namespace and UUID version of the run ids that are derived from Idempotency-Keys.
_KEYS = "belay idempotency key"
KEY_VERSION = 8
#: After a connection is lost during a commit, it is unknown whether the run was created. The create
#: is repeated with the same id, and either finds the run or creates it.
ASK_AGAIN = tenacity.Retrying(
    retry=tenacity.retry_if_exception_type(Interrupted),
    wait=tenacity.wait_random_exponential(multiplier=0.1, max=0.5),
    stop=tenacity.stop_after_attempt(4),
    reraise=True,
)
THREAD_BUSY = (
    "Thread is already running a task. Wait for it to finish or choose a different multitask "
    "strategy."
)


def new_id() -> UUID:
    """Return a UUIDv7 (RFC 9562). These ids sort by creation time."""
    return UUID(str(uuid_utils.uuid7()))


@dataclass(frozen=True, slots=True)
class RunRequest:
    """A run to create, its caller and its thread. Without a `thread_id` it is a stateless run."""

    options: RunOptions
    thread_id: UUID | None
    request_id: str
    idempotency_key: str | None = None
    #: The headers that the project copies into the graph's `configurable`.
    headers: dict[str, str] = field(default_factory=dict)
    #: The caller's name, which limits count by, and the authenticated user, which the graph gets.
    caller: str | None = None
    user: Mapping[str, Any] | None = field(default=None, repr=False)
    #: What `Caller.as_creator` returns; None without authentication.
    creator: Mapping[str, Any] | None = None
    #: The caller whose Idempotency-Key it is, and the position among several creates of a request.
    key_scope: str = ""
    key_position: int = 0
    #: The metadata of a thread that is created for the run.
    thread_metadata: dict[str, Any] = field(default_factory=dict)
    #: The id, unless the client has chosen one.
    new_run_id: UUID = field(default_factory=new_id)

    @property
    def run_id(self) -> UUID:
        return self.chosen_id or self.new_run_id

    @property
    def temporary(self) -> bool:
        return self.thread_id is None and self.options.on_completion != "keep"

    @property
    def chosen_id(self) -> UUID | None:
        """Return the id that the client chose, itself or by an Idempotency-Key; None if it chose
        none. The same key gives the same id."""
        if self.options.run_id is not None:
            return self.options.run_id
        if self.idempotency_key is None:
            return None
        return _id_of_key(self.key_scope, self.thread_id, self.idempotency_key, self.key_position)


def _id_of_key(scope: str, thread_id: UUID | None, key: str, position: int) -> UUID:
    """Return the id that a key stands for: a UUID of version 8, which clients may not choose. So no
    caller can use, or probe for, an id that another caller's key stands for."""
    named = "\n".join((_KEYS, scope, str(thread_id or ""), str(position), key))
    digest = int.from_bytes(hashlib.sha256(named.encode()).digest()[:16])
    return UUID(int=digest & ~(0xF << 76) & ~(0x3 << 62) | (KEY_VERSION << 76) | (0x2 << 62))


def create_run(parts: Parts, request: RunRequest) -> Run:
    """Create a run. After the commit it ends exactly once, even if processes die.

    Raises NotFound (thread, assistant, checkpoint, or the id of a run that was rolled back),
    Conflict (thread busy with `reject`, or id in use), InvalidRequest, TooLarge, TooMany;
    Unavailable when no run was created, or that is unknown because the connection was lost.
    """
    run_id = request.run_id
    try:
        if (run := _create_at_once(parts, request, run_id)) is not None:
            return run
    except Interrupted:
        log.warning("connection lost while creating run %s, retrying with the same id", run_id)
    try:
        return ASK_AGAIN(_create_run, parts, request, run_id)
    except _IdTaken:
        # The client has sent the same create twice at the same time; the other one was first.
        with parts.database.connection() as conn:
            existing = _accepted_before(conn, run_id, request.thread_id)
        if existing is None:  # the id belongs to a run that the caller may not see
            raise Conflict(f"Run {run_id} already exists") from None
        return existing


def _create_at_once(parts: Parts, request: RunRequest, run_id: UUID) -> Run | None:
    """Create a run that needs no decisions, with one SQL statement.

    Return None, having changed nothing, when decisions are needed or the cached assistant is stale.
    """
    assistant = parts.assistant_cache.get(request.options.assistant_id)
    if assistant is None or not _leaves_nothing_to_decide(parts, request, assistant):
        return None
    refuse_unknown_nodes(parts.graphs, assistant, request.options)
    with parts.database.connection() as conn:
        thread = _thread_defaults(conn, request)
        if thread is None:
            return None
        new = _new_run(parts, request, assistant, thread, run_id)
        if new.kwargs.starts_at_checkpoint:
            return None
        fault_points.reached(FaultPoint.BEFORE_COMMIT, run_id)
        accepted = run_rows.accept_run(
            conn,
            new,
            assistant_updated_at=assistant.updated_at,
            new_thread=request.thread_id is None,
            thread_metadata=request.thread_metadata,
            ttl=parts.graphs.project.thread_ttl,
            rering_seconds=parts.settings.rering_seconds,
        )
    if accepted is None:
        return None
    fault_points.reached(FaultPoint.COMMITTED, run_id)
    _ring_if_next(parts.doorbell, run_id, accepted.ringable)
    return run_rows.as_accepted(new, accepted)


def _thread_defaults(conn: Connection, request: RunRequest) -> ThreadDefaults | None:
    """Return what the run's thread gives to it. Return None if there is no such thread."""
    if request.thread_id is None:
        return ThreadDefaults(new_id(), metadata=request.thread_metadata)
    return thread_rows.thread_defaults(conn, request.thread_id)


def _leaves_nothing_to_decide(parts: Parts, request: RunRequest, assistant: Assistant) -> bool:
    if request.options.strategy != MultitaskStrategy.ENQUEUE:
        return False
    if request.chosen_id is not None:
        return False
    # A limit on pending runs needs a count first. An assistant that may be another caller's must be
    # authorized first, before any other error can reveal that it exists.
    counted = parts.settings.max_pending_runs and request.caller is not None
    is_shared = parts.database.access is EVERYTHING or assistant.is_system
    return not counted and is_shared


def _ring_if_next(doorbell: Doorbell, run_id: UUID, head: Sequence[Ringable]) -> None:
    for ringable in head:
        if ringable.run_id == run_id:
            doorbell.ring(ringable)
            fault_points.reached(FaultPoint.RUNG, run_id)


class _IdTaken(Exception):
    """A run with this id was created meanwhile; this transaction is rolled back."""


def _create_run(parts: Parts, request: RunRequest, run_id: UUID) -> Run:
    accepted = parts.database.transaction(
        lambda conn: create_in_transaction(parts, conn, request, run_id)
    )
    return announce_accepted(parts, request, accepted)


def announce_accepted(parts: RunParts, request: RunRequest, accepted: Accepted) -> Run:
    """Announce a created run after the commit: set the cancel flags of the runs it superseded, and
    ring the doorbell if it is the thread's next run. Return the run."""
    run_id = accepted.run.run_id
    action = _action_of(request.options.strategy)
    fault_points.reached(FaultPoint.COMMITTED, run_id)
    if accepted.cancelled is not None and action is not None:
        announce_cancelled(parts, accepted.cancelled, action)
    _ring_if_next(parts.doorbell, run_id, accepted.head)
    return accepted.run


def create_runs(parts: Parts, requests: Sequence[RunRequest]) -> list[Run]:
    """Create all runs in their order, or none. Raises what `create_run` raises, and TooMuch."""

    def create_all(conn: Connection) -> list[Accepted]:
        _refuse_large_batch(parts, conn, requests)
        accepted = []
        for request in requests:
            accepted.append(create_in_transaction(parts, conn, request, request.run_id))
            yield_to_sockets()  # a run may have megabytes of its assistant's config
        return accepted

    try:
        accepted = ASK_AGAIN(parts.database.transaction, create_all)
    except _IdTaken as error:
        raise Conflict("A run with one of these ids is being created; try again.") from error
    return [
        announce_accepted(parts, request, one)
        for request, one in zip(requests, accepted, strict=True)
    ]


def _refuse_large_batch(parts: Parts, conn: Connection, requests: Sequence[RunRequest]) -> None:
    """Raise TooMuch if the response, which has the kwargs of all runs, would exceed
    BELAY_MAX_ANSWER_BYTES. Each run's kwargs include its assistant's config, so a small request may
    have a large response. Checked before the first run is inserted."""
    size = 0
    for request in requests:
        assistant = resolve_assistant(conn, parts.graphs, request.options.assistant_id)
        thread = _thread_defaults(conn, request) or ThreadDefaults(request.run_id)
        merged = _merge(parts, request, assistant, thread)
        size += len(to_json(merged.kwargs.to_document()))
        yield_to_sockets()
        if size > parts.settings.max_answer_bytes:
            raise TooMuch(parts.settings.max_answer_bytes)


@dataclass(frozen=True, slots=True)
class Accepted:
    """A created run, the runs it superseded, and the head of its thread's queue."""

    run: Run
    cancelled: Cancelled | None
    head: Sequence[Ringable]


def create_in_transaction(
    parts: RunParts, conn: Connection, request: RunRequest, run_id: UUID
) -> Accepted:
    """Create a run within a transaction. Call `announce_accepted` after the commit."""
    named = request.options.assistant_id
    assistant = resolve_assistant(conn, parts.graphs, named)
    if not keep_assistant(conn, assistant):
        raise NotFound("Thread or assistant not found.")
    parts.assistant_cache.keep(named, assistant)
    refuse_unknown_nodes(parts.graphs, assistant, request.options)
    if (existing := _accepted_before(conn, run_id, request.thread_id)) is not None:
        head = claim_rows.next_runs_of_threads(conn, [existing.thread_id])
        return Accepted(existing, None, head)
    _refuse_too_many(parts.settings, conn, request.caller)
    thread_id = _thread_of(parts, conn, request)
    thread = thread_rows.thread_defaults(conn, thread_id) or ThreadDefaults(thread_id)
    new = _new_run(parts, request, assistant, thread, run_id)
    _refuse_unknown_checkpoint(conn, new)
    cancelled = _make_room(conn, request, thread_id, run_id)
    run = run_rows.insert_run(conn, new, rering_seconds=parts.settings.rering_seconds)
    if run is None:
        raise _IdTaken
    if request.chosen_id is not None:  # a deleted run may have had it
        drop_old_log(parts.event_log, run_id)
        run_rows.disown_checkpoints(conn, thread_id, run_id)
    head = claim_rows.next_runs_of_threads(conn, [thread_id])
    fault_points.reached(FaultPoint.BEFORE_COMMIT, run_id)
    return Accepted(run, cancelled, head)


def _refuse_too_many(settings: Settings, conn: Connection, caller: str | None) -> None:
    """Raise TooMany when the caller has reached BELAY_MAX_PENDING_RUNS. The count takes a lock, so
    that concurrent creates of one caller cannot exceed the limit."""
    most = settings.max_pending_runs
    if most and caller is not None and run_rows.pending_runs_of(conn, caller) >= most:
        raise TooMany(f"You may have {most} pending runs; try again when some have started")


def _action_of(strategy: MultitaskStrategy) -> CancelAction | None:
    if strategy == MultitaskStrategy.INTERRUPT:
        return CancelAction.INTERRUPT
    if strategy == MultitaskStrategy.ROLLBACK:
        return CancelAction.ROLLBACK
    return None


def _thread_of(parts: RunParts, conn: Connection, request: RunRequest) -> UUID:
    """Return the run's thread, locked. Create it for a stateless run or `if_not_exists: create`.

    Raises NotFound.
    """
    ttl = parts.graphs.project.thread_ttl
    if request.thread_id is None:
        thread_id = new_id()
        thread_rows.insert_thread(conn, thread_id, request.thread_metadata, ttl)
    else:
        thread_id = request.thread_id
        if request.options.if_not_exists == "create" and thread_rows.insert_thread(
            conn, thread_id, request.thread_metadata, ttl
        ):
            drop_old_log(parts.event_log, thread_id)
    if not thread_rows.lock_thread(conn, thread_id):
        raise NotFound("Thread or assistant not found.")
    return thread_id


def _accepted_before(conn: Connection, run_id: UUID, thread_id: UUID | None) -> Run | None:
    """Return the run that an earlier attempt of the same create has created; None if there is none.

    Raises NotFound when that run was rolled back, Conflict when it is on another thread.
    """
    if run_rows.has_tombstone(conn, run_id):
        raise NotFound("Run not found")
    run = run_rows.get_run(conn, run_id)
    if run is not None and thread_id not in (None, run.thread_id):
        raise Conflict(f"Run {run_id} already exists")
    return run


def refuse_unknown_nodes(graphs: GraphRegistry, assistant: Assistant, options: RunOptions) -> None:
    """Raise InvalidRequest for a node that is not in the graph; LangGraph would ignore it."""
    nodes = graphs.nodes_of(assistant.graph_id)
    if nodes is None:
        return
    for node in options.named_nodes:
        if node not in nodes and node not in ("*", "__end__"):
            raise InvalidRequest(f"Node '{node}' is not in graph '{assistant.graph_id}'")


def _refuse_unknown_checkpoint(conn: Connection, new: NewRun) -> None:
    """Raise NotFound for an unknown checkpoint, from which a graph would start with an empty state;
    InvalidRequest for a subgraph's checkpoint without its checkpoint_map."""
    if not new.kwargs.starts_at_checkpoint:
        return
    configurable = new.kwargs.configurable
    checkpoint_id = configurable.get("checkpoint_id")
    namespace = configurable.get("checkpoint_ns", "")
    if namespace and not configurable.get("checkpoint_map"):
        raise InvalidRequest("checkpoint: a subgraph's checkpoint needs its checkpoint_map")
    if not run_rows.checkpoint_exists(conn, new.thread_id, namespace, checkpoint_id):
        raise NotFound(f"Checkpoint {checkpoint_id or namespace} not found")


def _make_room(
    conn: Connection, request: RunRequest, thread_id: UUID, run_id: UUID
) -> Cancelled | None:
    """Apply the multitask strategy to the thread's active runs, and return what was cancelled.

    Raises Conflict for `reject` on a busy thread.
    """
    strategy = request.options.strategy
    action = _action_of(strategy)
    if strategy == MultitaskStrategy.REJECT and run_rows.thread_is_busy(conn, thread_id):
        raise Conflict(THREAD_BUSY)
    if action is None:
        return None
    active = cancel_rows.active_runs_of_thread(conn, thread_id)
    if not active:
        return None
    return cancel_locked_runs(conn, active, action, superseded_reason(action, run_id))


def _merge(
    parts: RunParts,
    request: RunRequest,
    assistant: Assistant,
    thread: ThreadDefaults,
) -> MergedRun:
    """Return the run's merged options. Raises BadRequest, TooLarge."""
    options = request.options
    refuse_many_keys(config=options.config, context=options.context, metadata=options.metadata)
    merged = build_run_kwargs(
        options,
        assistant=assistant,
        thread=thread,
        run_id=request.run_id,
        request_id=request.request_id,
        headers=request.headers,
        user=request.user,
        temporary=request.temporary,
        defaults=parts.graphs.project.defaults.get(assistant.graph_id, {}),
    )
    kwargs = merged.kwargs
    refuse_many_keys(config=kwargs.config, context=kwargs.context, metadata=merged.metadata)
    refuse_large(
        parts.settings.max_run_bytes,
        "BELAY_MAX_RUN_BYTES",
        kwargs=kwargs.to_document(),
        metadata=merged.metadata,
    )
    return merged


def _new_run(
    parts: RunParts,
    request: RunRequest,
    assistant: Assistant,
    thread: ThreadDefaults,
    run_id: UUID,
) -> NewRun:
    options = request.options
    merged = _merge(parts, request, assistant, thread)
    return NewRun(
        run_id=run_id,
        thread_id=thread.thread_id,
        assistant_id=assistant.assistant_id,
        graph_id=assistant.graph_id,
        queue=parts.graphs.queue_of(assistant.graph_id),
        metadata=merged.metadata,
        kwargs=merged.kwargs,
        thread_config=merged.thread_config,
        thread_configurable=merged.thread_configurable,
        multitask_strategy=options.strategy,
        temporary=request.temporary,
        timeout_seconds=options.timeout_seconds,
        after_seconds=max(0.0, float(options.after_seconds or 0)),
        id_chosen=request.chosen_id is not None,
        caller=request.caller,
        creator=None if request.creator is None else dict(request.creator),
    )
