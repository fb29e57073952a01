"""One attempt of one run, from claim to outcome, as named steps. See `place.py` for where.

claim ▸ execute ▸ end          the graph reached its end
                ▸ stop         the supervisor requested it: cancel, timeout or drain
                ▸ abandon      the lease is lost: another worker has the run

While Postgres is unavailable, a claim waits until the worker drains, a checkpoint until a stop is
requested, and the end until the lease is lost. It is lost only if a sweeper takes the run over; the
supervisor then requests a stop of this attempt.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from functools import partial
from typing import TypeVar
from uuid import UUID

import psycopg

from belay_server.bus.client import RedisError
from belay_server.bus.event_log import Started
from belay_server.db import run_claims as claim_rows
from belay_server.db import runs as run_rows
from belay_server.db.own_checkpoints import find_garbage, forget_garbage
from belay_server.db.postgres.connection import Connection
from belay_server.db.postgres.outages import in_short, is_worth_waiting
from belay_server.db.run_claims import ClaimRequest, RunEnding
from belay_server.domain.access import AUTH_USER, hash_of
from belay_server.domain.metrics import ASKED
from belay_server.domain.runs import Claim, ClaimedRun, Ending, RunStatus
from belay_server.graphs.checkpoints.run_saver import CheckpointsUnavailable, ClaimLost, RunSaver
from belay_server.graphs.project.factories import GraphUse
from belay_server.graphs.serde import to_json
from belay_server.graphs.store import GraphStore
from belay_server.graphs.thread_state import REDACTED
from belay_server.runtime import fault_points
from belay_server.runtime.fault_points import FaultPoint
from belay_server.services.agent_runs.output_mismatch import output_mismatch
from belay_server.services.runs.endings import (
    SMALL_ANSWER,
    STOPPED,
    RunEnd,
    end_cancelled_run,
    end_run,
    end_uncancelled_run,
    ended_before,
    timed_out,
    with_small_answer,
)
from belay_workers.execution import graph_executor
from belay_workers.execution.event_writer import RunEvents
from belay_workers.execution.graph_executor import Execution
from belay_workers.execution.place import STORE_CALL_SECONDS, Place
from belay_workers.execution.stops import RunCancelled
from belay_workers.slots import StopReason

log = logging.getLogger(__name__)

_T = TypeVar("_T")
_FLUSH_SECONDS = 2.0
#: How many attempts of a run are not counted because a stopped neighbour has cut them off.
_MOST_CUT_OFF = 100
#: Bytes of an end's JSON above which the connection is replaced. A server process of Postgres keeps
#: up to 50 times the memory of an end of 16 MiB until its connection is closed.
_LARGE_END = 1024 * 1024
#: Entries that are read of an earlier attempt's log, enough to contain its last steps.
_NEWEST_ENTRIES = 1_000


async def attempt_run(place: Place, run_id: UUID) -> bool:
    """Execute a run if it can be claimed. Return whether it could. Called for a doorbell message.

    After any other exception than those that are expected here, the slot still has the run. A child
    process then ends, and the run is recovered at once, as after any death.
    """
    claimed = None
    if place.slots.draining:
        return False
    place.slot.claiming(run_id)
    fault_points.reached(FaultPoint.DELIVERED, run_id)
    try:
        claimed = await _claim(place, run_id)
        if claimed is not None:
            await _attempt(place, claimed)
    except (ClaimLost, CheckpointsUnavailable, psycopg.Error) as error:
        if isinstance(error, psycopg.Error) and not is_worth_waiting(error):
            raise
        # This attempt has not ended the run. If it still holds the lease, that expires, and another
        # attempt resumes from the checkpoint.
        log.warning("abandoned the attempt of run %s: %s", run_id, error)
        await place.blocking(place.database.drop)
    finally:
        place.access.end()
        place.log_about(None)
    place.slot.idle()
    return claimed is not None


async def _claim(place: Place, run_id: UUID) -> ClaimedRun | None:
    token = place.access.new_token()
    request = ClaimRequest(run_id, hash_of(token))
    claimed = await place.claim(request, partial(_claim_alone, place, request))
    if claimed is not None:
        place.access.begin(run_id, token)
    return claimed


def _claim_alone(place: Place, request: ClaimRequest, conn: Connection) -> ClaimedRun | None:
    """Claim a run. A claim whose response was lost may have been committed: then return the run if
    this process holds its lease."""
    run_id, token_hash = request.run_id, request.token_hash
    if request.may_be_held:
        held = claim_rows.held_run(conn, run_id, owner=place.owner, token_hash=token_hash)
        if held is not None:
            return held
    request.may_be_held = True
    claimed = claim_rows.claim_run(
        conn,
        run_id,
        owner=place.owner,
        lease_seconds=place.settings.lease_seconds,
        graph_ids=place.graph_ids,
        token_hash=token_hash,
    )
    if claimed is None:
        _put_off_unknown_graph(place, conn, run_id)
    return claimed


def _put_off_unknown_graph(place: Place, conn: Connection, run_id: UUID) -> None:
    """Leave a run pending whose graph is not in this worker's project: another worker may have it,
    such as during a rolling deployment, or this one after its project has been corrected."""
    graph_id = claim_rows.put_off_unknown_graph(conn, run_id, place.graphs.graph_ids)
    if graph_id is not None and graph_id not in place.unknown_graphs:
        place.unknown_graphs.add(graph_id)
        log.warning(
            "run %s stays pending: its graph '%s' is not in the project of this worker. Start a "
            "worker that has the graph, or cancel the run. (Logged once for each graph.)",
            run_id,
            graph_id,
        )


async def _attempt(place: Place, claimed: ClaimedRun) -> None:
    limit = claimed.timeout_seconds or place.settings.run_timeout_seconds
    attempt = claimed.attempts
    graph = place.graphs.graph_ids.index(claimed.graph_id)
    place.slot.running(claimed.claim, claimed.thread_id, time.monotonic() + limit, attempt, graph)
    if claimed.claim_no == 1:
        place.slot.counters.claimed(claimed.waited_seconds)
    place.log_about(
        {"run_id": str(claimed.run_id), "thread_id": str(claimed.thread_id), "attempt": attempt}
    )
    fault_points.reached(FaultPoint.CLAIMED, claimed.run_id)
    # The last events of a process that died may not have been written, unless they are resumable.
    behind_gap = claimed.claim_no > 1 and not claimed.kwargs.resumable
    events = place.event_writer.of_run(claimed.claim, _started(claimed), behind_gap=behind_gap)
    events.emit("metadata", to_json({"run_id": str(claimed.run_id), "attempt": claimed.attempts}))
    prepared = await _prepare(place, claimed, events)
    ending = _checked(prepared, claimed, await _execute(place, claimed, prepared))
    await _settle(place, claimed.claim)
    place.slot.finishing()
    fault_points.reached(FaultPoint.BEFORE_END, claimed.run_id)
    end = await _write_some_end(place, claimed, prepared, ending)
    if end is not None:
        fault_points.reached(FaultPoint.END_COMMITTED, claimed.run_id)
        await place.announce(dataclasses.replace(end, emitted=events.emitted))
        place.slot.counters.ended(end, ASKED, place.slot.seconds_since_claim())
        fault_points.reached(FaultPoint.END_ANNOUNCED, claimed.run_id)
        await _delete_own_values(place)


async def _delete_own_values(place: Place) -> None:
    """Delete in the project's own checkpointer, if it has one, what has been deleted in Postgres.
    If that fails, it is done after the next end of a run."""
    if place.checkpointer is None:
        return
    try:
        garbage = await place.on_database(find_garbage, keep_waiting=lambda: False)
        if garbage:
            await place.blocking(partial(place.checkpointer.delete, garbage))
            forget = partial(forget_garbage, garbage=garbage)
            await place.on_database(forget, keep_waiting=lambda: False)
    except Exception as error:  # noqa: BLE001  (the project's, too; the run has ended)
        log.warning("cannot delete checkpoints in the project's checkpointer: %r", error)


async def _settle(place: Place, claim: Claim) -> None:
    """Wait until the calls of the store are done. After a stop, cancel those that take long."""
    while place.store.is_used:
        await place.blocking(partial(place.store.settle, STORE_CALL_SECONDS))
        if place.asked_of(claim) is not StopReason.NONE:
            place.store.cancel_calls()


def _started(claimed: ClaimedRun) -> Started | None:
    """Return the entry for the thread's log, None for a stateless run, whose thread has no
    followers."""
    if claimed.temporary:
        return None
    return Started(claimed.thread_id, claimed.kwargs.resumable)


def _may_continue(place: Place, claim: Claim) -> Callable[[], bool]:
    """Return a condition for waiting for Postgres: no stop of this run has been requested."""
    return lambda: place.asked_of(claim) is StopReason.NONE


async def _on_the_row(place: Place, claim: Claim, write: Callable[[Connection], _T]) -> _T:
    """Write the result of the attempt, waiting for Postgres without a limit: until the lease is
    lost, or the supervisor, which has a connection of its own, kills this process."""
    written = await place.on_database(
        write, keep_waiting=lambda: place.asked_of(claim) is not StopReason.LEASE_LOST
    )
    if place.reconnects:
        place.reconnects = False
        await place.blocking(place.database.drop)
    return written


class _Prepared:
    """The saver and the events of an attempt, and its graph once `_open_and_execute` has opened
    it."""

    def __init__(
        self,
        saver: RunSaver,
        events: RunEvents,
        *,
        resumes: bool = False,
        sent_before: frozenset[tuple[str, bytes]] = frozenset(),
    ) -> None:
        self.saver = saver
        self.events = events
        self.resumes = resumes
        self.sent_before = sent_before
        #: Whether the attempt ended because of what a stopped neighbour has taken with it.
        self.is_cut_off = False
        self.execution: Execution | None = None


async def _prepare(place: Place, claimed: ClaimedRun, events: RunEvents) -> _Prepared:
    may_continue = _may_continue(place, claimed.claim)
    resumable = claimed.kwargs.resumable
    saver = place.saver(
        claimed.claim,
        keep_waiting=may_continue,
        behind=claimed.kwargs.writes_behind,
        is_new=not claimed.has_checkpoints,
        is_retry=claimed.claim_no > 1,
        # Events that clients can read again are in the log before what a task has written is
        # stored. If this process dies in between, the task is repeated, and no event is missing.
        before_store=(lambda: events.flush(_FLUSH_SECONDS)) if resumable else None,
        aes_key=place.settings.aes_key,
        checkpointer=place.checkpointer,
    )
    if claimed.claim_no == 1:
        return _Prepared(saver, events)

    def last_checkpoint(conn: Connection) -> str | None:
        return run_rows.last_checkpoint_of_run(conn, claimed.thread_id, claimed.run_id)

    checkpoint = await place.on_database(last_checkpoint, keep_waiting=may_continue)
    if checkpoint is None:
        return _Prepared(saver, events)
    sent_before: frozenset[tuple[str, bytes]] = frozenset()
    if resumable:
        sent_before = await place.blocking(partial(_sent_before, place, claimed))
    return _Prepared(saver, events, resumes=True, sent_before=sent_before)


def _sent_before(place: Place, claimed: ClaimedRun) -> frozenset[tuple[str, bytes]]:
    """Return the values and updates in the log of earlier attempts, as (name, data). Used for runs
    whose stream can be resumed."""
    try:
        newest = place.event_log.read_newest(claimed.run_id, count=_NEWEST_ENTRIES)
        said = [event for event in newest if event.name.partition("|")[0] in ("values", "updates")]
        whole = [place.event_log.read_whole(claimed.run_id, event) for event in said]
    except RedisError as error:
        log.warning(
            "cannot read the events of earlier attempts of run %s, some may be sent twice: %s",
            claimed.run_id,
            error,
        )
        return frozenset()
    return frozenset((event.name, event.data) for event in whole if event is not None)


async def _execute(place: Place, claimed: ClaimedRun, prepared: _Prepared) -> Ending | None:
    """Return the graph's ending, or None when it was stopped before it reached one."""
    try:
        ending = await place.run(claimed.claim, _open_and_execute(place, claimed, prepared))
    except (asyncio.CancelledError, CancelledError, RunCancelled):
        prepared.is_cut_off = _may_be_cut_off(place, claimed)
        if place.asked is not StopReason.NONE or prepared.is_cut_off:
            return None
        # A graph that cancels itself without a requested stop has failed.
        return _failed(place, prepared, "CancelledError", "The graph cancelled itself.")
    except ClaimLost:
        raise
    except CheckpointsUnavailable:
        return None  # a stop was requested, or it would still be waiting
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:
        log.warning("a graph raised an exception, which ends its run", exc_info=error)
        return _failed(place, prepared, type(error).__name__, graph_executor.message_of(error))
    if ending.status is RunStatus.ERROR and place.asked is not StopReason.NONE:
        # A node raised its own error because of the stop; it was stopped all the same.
        return None
    return ending


def _may_be_cut_off(place: Place, claimed: ClaimedRun) -> bool:
    """Return whether a run whose node was cancelled without a stop is attempted again: a stopped
    neighbour may have taken what this run had waited for with it, such as the one look-up of an
    address that several connections wait for."""
    has_attempts = claimed.attempts < place.settings.max_attempts or not _counts_when_cut_off(
        claimed
    )
    return place.is_disturbed and has_attempts


def _counts_when_cut_off(claimed: ClaimedRun) -> bool:
    """Return whether an attempt is counted although a stopped neighbour has cut it off. The first
    ones are not: clients who stop runs of their own must not end this one."""
    return claimed.claim.uncounted(claimed.attempts) >= _MOST_CUT_OFF


def _checked(prepared: _Prepared, claimed: ClaimedRun, ending: Ending | None) -> Ending | None:
    """Return an error ending when the output does not match the run's output schema.

    Validation may take long for some schemas. A stop then kills this process: there is no node to
    raise in.
    """
    schema = claimed.kwargs.output_schema
    if ending is None or schema is None or ending.status is not RunStatus.SUCCESS:
        return ending
    values = ending.values if isinstance(ending.values, dict) else {}
    wrong = output_mismatch(schema, values.get("structured"))
    if wrong is None:
        return ending
    prepared.events.emit("error", to_json(wrong))
    return dataclasses.replace(ending, status=RunStatus.ERROR, error=wrong)


def _failed(place: Place, prepared: _Prepared, kind: str, message: str) -> Ending:
    message = REDACTED if place.settings.redact_errors else graph_executor.shortened(message)
    error = {"error": kind, "message": message}
    prepared.events.emit("error", to_json(error))
    return Ending(RunStatus.ERROR, values_known=False, has_next=True, error=error)


async def _open_and_execute(place: Place, claimed: ClaimedRun, prepared: _Prepared) -> Ending:
    def emit(name: str, data: bytes) -> None:
        # An error that a node raises because of a stop is not the run's error.
        if name != "error" or place.asked is StopReason.NONE:
            place.uninterrupted(prepared.events.emit, name, data)

    place.access.enter()
    with place.store.of_run(_may_continue(place, claimed.claim)) as store:
        return await _execute_with(store, place, claimed, prepared, emit)


async def _execute_with(
    store: GraphStore,
    place: Place,
    claimed: ClaimedRun,
    prepared: _Prepared,
    emit: graph_executor.Emit,
) -> Ending:
    async with place.graphs.open(claimed.graph_id, _use_of(claimed, store)) as graph:
        prepared.execution = Execution(
            graph=graph,
            saver=prepared.saver,
            store=store,
            kwargs=claimed.kwargs,
            resumes=prepared.resumes,
            attempt=claimed.attempts,
            redact_errors=place.settings.redact_errors,
            may_be_cut_off=partial(_may_be_cut_off, place, claimed),
            sent_before=prepared.sent_before,
        )
        fault_points.reached(FaultPoint.GRAPH_LOADED, claimed.run_id)
        return await graph_executor.execute(prepared.execution, emit)


def _use_of(claimed: ClaimedRun, store: GraphStore) -> GraphUse:
    kwargs = claimed.kwargs
    return GraphUse(
        "threads.create_run",
        kwargs.config,
        store=lambda: store,
        user=kwargs.configurable.get(AUTH_USER),
        context=kwargs.context,
    )


async def _write_some_end(
    place: Place, claimed: ClaimedRun, prepared: _Prepared, ending: Ending | None
) -> RunEnd | None:
    """Write the end. If its values cannot be encoded, or Postgres refuses them, write an error end
    without values."""
    try:
        return await _write_end(place, claimed, prepared, ending)
    except (psycopg.Error, TypeError, ValueError, RecursionError) as error:
        if isinstance(error, psycopg.Error) and is_worth_waiting(error):
            raise
        log.exception("the end of run %s cannot be stored", claimed.run_id)
        message = f"Its end cannot be stored: {in_short(error)}"
        refused = _failed(place, prepared, type(error).__name__, message)
    return await _on_the_row(
        place, claimed.claim, lambda conn: end_run(conn, claimed.thread_id, claimed.claim, refused)
    )


def _kept(place: Place, ending: Ending) -> Ending:
    """Return an end as its row stores it. Large values, and interrupts that are large by
    themselves, stay in the checkpoint and are read from there."""
    most = place.settings.max_outcome_bytes
    size = len(to_json([ending.values, ending.interrupts]))
    if size <= most:
        place.reconnects = size > _LARGE_END
        return with_small_answer(ending) if size <= 2 * SMALL_ANSWER else ending
    fits = len(to_json(ending.interrupts)) <= most
    return dataclasses.replace(
        ending,
        values=None,
        values_known=False,
        interrupts=ending.interrupts if fits else None,
        has_next=ending.has_next or bool(ending.interrupts),
    )


async def _write_end(
    place: Place, claimed: ClaimedRun, prepared: _Prepared, ending: Ending | None
) -> RunEnd | None:
    """Write the end. Return None when the run is pending again, or when the lease is lost."""
    claim, thread_id = claimed.claim, claimed.thread_id
    asked = place.asked_of(claim) if ending is None else StopReason.NONE
    if asked is StopReason.LEASE_LOST:
        log.warning("lost the lease on run %s; stopped the local attempt", claim.run_id)
        return None
    if asked is StopReason.DRAIN:
        return await _put_back(place, claimed, prepared, uncharge=True)
    if asked is StopReason.NONE and prepared.is_cut_off:
        log.warning("run %s waited for work of a run that was stopped; repeating it", claim.run_id)
        return await _put_back(place, claimed, prepared, uncharge=not _counts_when_cut_off(claimed))
    if asked is StopReason.TIMEOUT:
        ending = timed_out(await _reached(place, prepared))
        prepared.events.emit("error", to_json(ending.error))
    if ending is None:
        return await _end_cancelled(place, claimed, prepared)
    final = _kept(place, ending)
    await _flush(place, prepared)
    alone = partial(end_uncancelled_run, thread_id=thread_id, claim=claim, ending=final)
    end = await _write_together(place, RunEnding(thread_id, claim, final), alone)
    return end or await _end_after_late_cancel(place, claimed, final)


async def _end_after_late_cancel(place: Place, claimed: ClaimedRun, final: Ending) -> RunEnd | None:
    """Write the end of a run for which a cancel was accepted when its graph had ended. What the
    graph has left in the background is ended first, as at every cancel."""
    claim, thread_id = claimed.claim, claimed.thread_id
    written = await _on_the_row(place, claim, lambda conn: ended_before(conn, claim))
    if written is not None:
        return written
    await place.end_leftovers()
    return await _on_the_row(
        place, claim, lambda conn: end_cancelled_run(conn, thread_id, claim, final)
    )


async def _end_cancelled(place: Place, claimed: ClaimedRun, prepared: _Prepared) -> RunEnd | None:
    """Write the end of a run that was stopped because of a cancel, with the state it reached."""
    claim, thread_id = claimed.claim, claimed.thread_id
    reached = _kept(place, await _reached(place, prepared))
    await _flush(place, prepared)
    alone = partial(end_cancelled_run, thread_id=thread_id, claim=claim, ending=reached)
    return await _write_together(
        place, RunEnding(thread_id, claim, reached, is_interrupted=True), alone
    )


async def _write_together(
    place: Place, ending: RunEnding, alone: Callable[[Connection], RunEnd | None]
) -> RunEnd | None:
    """Write an end together with those of other runs, or by `alone` if it is large."""
    if place.reconnects:
        return await _on_the_row(place, ending.claim, alone)
    return await place.end(ending, alone)


async def _flush(place: Place, prepared: _Prepared) -> None:
    """Write the events before the end, so that the log is complete when the end is announced,
    unless Redis takes too long."""
    events = prepared.events
    if not await place.blocking(partial(events.flush, _FLUSH_SECONDS)):
        run_id = events.claim.run_id
        log.warning("events of run %s are not written yet; writing its end first", run_id)


async def _put_back(
    place: Place, claimed: ClaimedRun, prepared: _Prepared, *, uncharge: bool
) -> RunEnd | None:
    """Make a run pending again. `uncharge`: do not count the attempt. A cancel that was accepted
    meanwhile takes precedence."""
    claim, rering = claimed.claim, place.settings.rering_seconds
    ring = await _on_the_row(
        place,
        claim,
        lambda conn: claim_rows.put_run_back(conn, claim, uncharge=uncharge, rering_seconds=rering),
    )
    if ring is None:
        return await _end_cancelled(place, claimed, prepared)
    await place.blocking(partial(place.announcer.ring, [ring]))
    return None


async def _reached(place: Place, prepared: _Prepared) -> Ending:
    """Return the state of a stopped run, from its last checkpoint."""
    if prepared.execution is None or place.is_hurried:
        return STOPPED  # the first request for the values reads them
    try:
        ending = await place.finish(graph_executor.stopped(prepared.execution))
    except ClaimLost:
        raise
    except CheckpointsUnavailable:
        return STOPPED
    except Exception:  # its state cannot be read; that must not prevent its end
        log.exception("the state of a stopped run could not be read")
        return STOPPED
    return ending
