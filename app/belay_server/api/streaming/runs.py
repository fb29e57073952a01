"""Stream a run to a client: its events, its end, and the client's disconnect.

The generators here yield bytes for the connection. They read events from a subscription, large
events from Redis, and the end of a run from Postgres, unless its announcement has the outcome.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TypeVar
from uuid import UUID

from belay_server.api.http.bodies.chunks import in_chunks
from belay_server.api.streaming.clients import StreamClient, in_parts
from belay_server.api.streaming.frames import GAP, HEARTBEAT, around_data, frame
from belay_server.bus.client import RedisError
from belay_server.bus.event_log import END_SEQ, NOT_KNOWN, START, Event, EventLog, Position
from belay_server.bus.run_feed import Subscription
from belay_server.db import run_cancels as cancel_rows
from belay_server.db import runs as run_rows
from belay_server.db.postgres.pool import Database, while_unavailable
from belay_server.db.run_cancels import CancelFilter
from belay_server.domain.errors import InvalidRequest, TooMany, Unavailable
from belay_server.domain.runs import CancelAction, Run, RunStatus, disconnect_reason
from belay_server.graphs.serde import to_json
from belay_server.services.parts import Parts
from belay_server.services.runs.cancellation import cancel_runs
from belay_server.services.runs.creation import RunRequest, create_run
from belay_server.services.runs.outcomes import End, NotEnded, end_of, large_answer

log = logging.getLogger(__name__)

_T = TypeVar("_T")
#: An empty chunk, at which the web server sends the response headers. They identify the run before
#: its first event.
HEADERS = b""
KEEP_ALIVE = b"\n"
#: The interval of queries while Postgres is unavailable.
_OUTAGE_SECONDS = 1.0
#: A client that has disconnected cannot repeat the cancel, so the server retries it for this long.
_CANCEL_SECONDS = 300.0
#: The entries of the event log of an ended run that are read at once.
_ENTRIES = 4
#: Event names of the stream modes whose names differ from their events'.
_MODE_EVENTS = {
    "messages": ("messages/partial", "messages/complete", "messages/metadata"),
    "messages-tuple": ("messages",),
}


@dataclass(frozen=True, slots=True)
class FollowedRun:
    """A run that a client follows, and how. Many of these may exist, each for as long as its
    run, so they hold no rows."""

    thread_id: UUID
    run_id: UUID
    #: Events have ids, and the stream can be resumed.
    resumable: bool
    cancel_on_disconnect: bool = False
    #: None: every event the run emits.
    stream_modes: tuple[str, ...] | None = None
    #: The position to resume from (exclusive).
    after: Position = START
    #: A subscription that was created before the run could start, so that it missed no event.
    subscription: Subscription | None = None


def follow_run(
    run: Run,
    *,
    cancel_on_disconnect: bool,
    stream_modes: tuple[str, ...] | None = None,
    after: Position = START,
    subscription: Subscription | None = None,
) -> FollowedRun:
    """Return an existing run as one that a client follows."""
    return FollowedRun(
        thread_id=run.thread_id,
        run_id=run.run_id,
        resumable=run.is_resumable,
        cancel_on_disconnect=cancel_on_disconnect,
        stream_modes=stream_modes,
        after=after,
        subscription=subscription,
    )


def follow_new_run(
    parts: Parts, request: RunRequest, *, cancel_on_disconnect: bool, events: bool
) -> FollowedRun:
    """Create a run and follow it from before its start. Raises what `create_run` raises."""
    if request.chosen_id is not None:  # it may have been created before, and may have ended
        run = create_run(parts, request)
        return follow_run(run, cancel_on_disconnect=cancel_on_disconnect)
    subscription = parts.feed.subscribe(request.run_id, events=events, has_row=False)
    try:
        run = create_run(parts, request)
    except BaseException:
        parts.feed.unsubscribe(subscription)
        raise
    subscription.has_row = True
    return follow_run(run, cancel_on_disconnect=cancel_on_disconnect, subscription=subscription)


def position_to_join(event_log: EventLog, run: Run, last_event_id: str | None) -> Position:
    """Return the position at which a joining client starts: that of its `Last-Event-ID`, or the
    newest event, so that only new events follow. While Redis is unavailable, that is not known.

    Raises InvalidRequest for an invalid `Last-Event-ID`.
    """
    if last_event_id is not None and run.is_resumable:
        if last_event_id in ("-1", "0", "-", ""):
            return START
        try:
            return Position.parse(last_event_id)
        except ValueError:
            raise InvalidRequest(f"Invalid Last-Event-ID: {last_event_id}") from None
    try:
        return event_log.last_position(run.run_id)
    except RedisError as error:
        log.warning("cannot read the event log of run %s: %s", run.run_id, error)
        return NOT_KNOWN


class StreamBody:
    """The body of a response that follows a run. It is created in the view, so that a waiting
    response has a shallow stack. Close it even if it was not read."""

    def __init__(self, parts: Parts, subscription: Subscription, chunks: Generator[bytes]) -> None:
        self._parts = parts
        self._subscription = subscription
        self._chunks = chunks

    def __iter__(self) -> Iterator[bytes]:
        return self._chunks

    def close(self) -> None:
        self._chunks.close()
        self._parts.feed.unsubscribe(self._subscription)


def stream_events(parts: Parts, followed: FollowedRun, client: StreamClient) -> StreamBody:
    """Stream server-sent events until the run has ended, and heartbeat comments."""
    parts = client.parts_of(parts)
    subscription = followed.subscription or parts.feed.subscribe(
        followed.run_id, after=followed.after
    )
    is_over: bool | None = False
    if followed.subscription is None:
        try:
            is_over = _end_if_over(parts, subscription, resumable=followed.resumable)
        except Unavailable:
            is_over = None
    return StreamBody(parts, subscription, _stream(parts, followed, client, subscription, is_over))


def _stream(
    parts: Parts,
    followed: FollowedRun,
    client: StreamClient,
    subscription: Subscription,
    is_over: bool | None,
) -> Generator[bytes]:
    """Yield the chunks of a stream. `is_over`: the run had ended before the subscription was
    created; None: unknown, as Postgres was unavailable."""
    stop_watching = client.watch(subscription.leave)
    heartbeat = parts.settings.heartbeat_seconds
    ended = False
    try:
        yield HEADERS
        if is_over is None:
            ask_again = partial(_end_if_over, parts, subscription, resumable=followed.resumable)
            is_over = yield from through_outages(HEARTBEAT, ask_again)
        # The error event of a run that had ended before is not repeated.
        sent_error = is_over
        beat_at = time.monotonic() + heartbeat
        last = followed.after
        if last == NOT_KNOWN and not is_over:
            newest = partial(parts.event_log.last_position, followed.run_id)
            last = yield from when_redis_answers(subscription, newest, last)
            subscription.begin_after(last)
            yield GAP
        while not subscription.drained and not subscription.client_left:
            events = subscription.take(beat_at)
            for some in in_parts(events):
                yield from _sent(parts.event_log, followed, client, subscription, some, last=last)
                last = some[-1].position
            sent_error = sent_error or any(event.name == "error" for event in events)
            if not events or time.monotonic() >= beat_at:
                beat_at = time.monotonic() + heartbeat
                if not subscription.ended and not subscription.client_left:
                    yield HEARTBEAT
        ended = subscription.drained
        if ended and subscription.misses_end:
            yield GAP
        if ended:
            ask = partial(_end_event, parts.database, followed, subscription.end_status, sent_error)
            if marker := (yield from through_outages(HEARTBEAT, ask)):
                yield marker
    finally:
        client_left = stop_watching()
        client.share.release()
        parts.feed.unsubscribe(subscription)
        if client_left and not ended:
            _cancel_on_disconnect(parts, followed)


def _sent(
    event_log: EventLog,
    followed: FollowedRun,
    client: StreamClient,
    subscription: Subscription,
    events: list[Event],
    *,
    last: Position,
) -> Generator[bytes]:
    """Yield the frames of small events, or of one large event, whose data is read now."""
    if not events[0].left_in_log or not is_wanted(events[0].name, followed.stream_modes):
        with client.turn():
            frames = _frames(events, followed, last)
        if frames:
            yield frames
        return
    whole = yield from client.whole_event(event_log, followed.run_id, events[0], subscription)
    if whole is None or not follows_directly(last, whole.position):
        yield GAP
    if whole is not None:
        head, tail = around_data(whole.name, whole.position if followed.resumable else None)
        yield head
        yield from in_chunks(whole.data)
        yield tail
    client.share.release()


def wait_for_outcome(parts: Parts, followed: FollowedRun, client: StreamClient) -> StreamBody:
    """Stream the outcome as JSON when the run has ended. Until then, send newlines, so that reverse
    proxies keep the connection open."""
    parts = client.parts_of(parts)
    subscription = followed.subscription or parts.feed.subscribe(followed.run_id, events=False)
    return StreamBody(parts, subscription, _wait(parts, followed, client, subscription))


def _wait(
    parts: Parts, followed: FollowedRun, client: StreamClient, subscription: Subscription
) -> Generator[bytes]:
    stop_watching = client.watch(subscription.leave)
    heartbeat = parts.settings.heartbeat_seconds
    ask = partial(end_of, parts, followed.thread_id, followed.run_id, client.share.caller)
    ended = False
    try:
        yield HEADERS
        may_have_ended = followed.subscription is None
        while not subscription.client_left:
            # Only for an id that this server has made for this run: the announcement of an earlier
            # run with the same id, which was deleted since, may come late.
            if subscription.answer and followed.subscription is not None:
                ended = True
                yield subscription.answer
                break
            if may_have_ended:
                subscription.rearm()
                try:
                    end = yield from through_outages(KEEP_ALIVE, ask)
                except NotEnded:
                    pass
                else:
                    ended = True
                    yield from _answer(parts, followed, client, subscription, end)
                    break
            may_have_ended = subscription.wait_for_end(time.monotonic() + heartbeat)
            if not may_have_ended:
                yield KEEP_ALIVE
    finally:
        client_left = stop_watching()
        client.share.release()
        parts.feed.unsubscribe(subscription)
        if client_left and not ended:
            _cancel_on_disconnect(parts, followed)


def _answer(
    parts: Parts, followed: FollowedRun, client: StreamClient, subscription: Subscription, end: End
) -> Generator[bytes]:
    """Yield the answer. Read a large answer when the client's share has room for it."""
    answer = end.answer
    if answer is None:
        if not (yield from client.wait_for_share(end.most_bytes, subscription, KEEP_ALIVE)):
            return
        read = partial(
            large_answer, parts, followed.thread_id, followed.run_id, client.share.caller
        )
        answer = yield from through_outages(KEEP_ALIVE, read)
        client.share.shrink(len(answer))
    yield from in_chunks(answer)


def when_redis_answers(
    subscription: Subscription, ask: Callable[[], _T], otherwise: _T
) -> Generator[bytes, None, _T]:
    """Call `ask` until Redis answers, and return its result; `otherwise` if the run has ended
    before, or the client has disconnected. Yield a heartbeat every second."""
    while not subscription.ended and not subscription.client_left:
        try:
            return ask()
        except RedisError as error:
            log.warning("Redis is unavailable, a stream waits to begin: %s", error)
        yield HEARTBEAT
        time.sleep(_OUTAGE_SECONDS)
    return otherwise


def through_outages(beat: bytes, ask: Callable[[], _T]) -> Generator[bytes, None, _T]:
    """Call `ask` until it succeeds, and return its result. Yield `beat` every second while Postgres
    is unavailable or a limit is exceeded."""
    while True:
        try:
            return ask()
        except Unavailable as error:
            log.warning("Postgres is unavailable, a client that follows a run waits: %s", error)
        except TooMany as error:
            log.debug("limit exceeded, a client that follows a run waits: %s", error)
        yield beat
        time.sleep(_OUTAGE_SECONDS)


def _end_event(
    database: Database, followed: FollowedRun, end_status: str | None, sent_error: bool
) -> bytes | None:
    """Return the last event of a stream, if the run's own events do not include its end; otherwise
    None."""
    if end_status not in (RunStatus.ERROR, RunStatus.TIMEOUT):
        return _cancelled_marker(database, followed, end_status)
    if sent_error:
        return None
    # The row has ended, but the error was not written to the event log, or not yet.
    with database.connection() as conn:
        now = run_rows.run_end(conn, followed.thread_id, followed.run_id)
    if now is None or now.error is None:
        return None
    return frame("error", to_json(now.error))


def _cancelled_marker(
    database: Database, followed: FollowedRun, end_status: str | None
) -> bytes | None:
    """Return the last event of a cancelled run: `end`, with the reason of the cancel.

    Both SDKs ignore an event of this name: JavaScript's has no handler for it, Python's treats it
    as the end of the run. The streams of other runs end without it, as on LangGraph's server.
    """
    if end_status not in (None, RunStatus.INTERRUPTED):
        return None
    with database.connection() as conn:
        now = run_rows.get_thread_run(
            conn, followed.thread_id, followed.run_id, ended_stateless=True
        )
        reason = (
            cancel_rows.rollback_reason(conn, followed.run_id) if now is None else now.cancel_reason
        )
    if now is not None and now.status != RunStatus.INTERRUPTED:
        return None
    status = "rollback" if now is None else RunStatus.INTERRUPTED
    return frame("end", to_json({"status": status, **(reason or {})}))


def _has_ended(database: Database, run_id: UUID) -> bool:
    with database.connection() as conn:
        return run_id in run_rows.ended_runs(conn, [run_id])


def _end_if_over(parts: Parts, subscription: Subscription, *, resumable: bool) -> bool:
    """Return whether the run had ended before the subscription was created. If so, deliver what its
    event log still has, and end the subscription.

    If a resumable run's log has no end, it is not whole, or Redis cannot be reached: then the next
    sweeps of the feed end the subscription.
    """
    if not _has_ended(parts.database, subscription.run_id):
        return False
    try:
        more = True
        while more and subscription.wants_more:
            events, more = parts.event_log.read_after(
                subscription.run_id, subscription.position, count=_ENTRIES
            )
            subscription.deliver(events)
    except RedisError as error:
        log.warning("cannot read the event log of run %s: %s", subscription.run_id, error)
    if subscription.wants_more and not resumable:
        subscription.end()
    return True


def _cancel_on_disconnect(parts: Parts, followed: FollowedRun) -> None:
    """Cancel the run of a client that has disconnected, if it asked for that. A server shutdown is
    not a disconnect."""
    if not followed.cancel_on_disconnect:
        return
    filter_ = CancelFilter(thread_id=followed.thread_id, run_ids=[followed.run_id])
    retrying = while_unavailable(_CANCEL_SECONDS)
    retrying(cancel_runs, parts, filter_, CancelAction.INTERRUPT, disconnect_reason())


def _frames(events: Iterable[Event], followed: FollowedRun, last: Position) -> bytes:
    """Encode the events that the client subscribed to. `last` is the position of the last event
    before them."""
    with_ids = followed.resumable
    modes = followed.stream_modes
    frames = []
    for event in events:
        if not follows_directly(last, event.position):
            frames.append(GAP)
        last = event.position
        if is_wanted(event.name, modes):
            frames.append(frame(event.name, event.data, event.position if with_ids else None))
    return b"".join(frames)


def follows_directly(last: Position, position: Position) -> bool:
    """Return whether no event is missing between two positions. Each attempt starts at 1. Events
    that another process than the run's worker has written are at the end of the log."""
    if position.seq >= END_SEQ - 1:
        return True
    return position.seq == (last.seq + 1 if position.claim_no == last.claim_no else 1)


def is_wanted(event_name: str, modes: tuple[str, ...] | None) -> bool:
    """Return whether an event belongs to one of the stream modes. An error always does."""
    if modes is None:
        return True
    base = event_name.partition("|")[0]
    if base == "error":
        return True
    return any(base in _MODE_EVENTS.get(mode, (mode,)) for mode in modes)
