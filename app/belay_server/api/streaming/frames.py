"""Encode server-sent events, as the HTML standard defines them (section 9.2)."""

from __future__ import annotations

#: A comment without a blank line after it, from which the JavaScript SDK would make an event.
HEARTBEAT = b": heartbeat\n"
#: A comment: events are missing here, because Redis was unavailable or the log was truncated.
GAP = b": gap\n"


def frame(name: str, data: bytes, event_id: object = None) -> bytes:
    """Return one server-sent event (HTML standard, section 9.2). Names and ids have no line break;
    `data` is JSON in one line."""
    head, tail = around_data(name, event_id)
    return b"%b%b%b" % (head, data, tail)


def around_data(name: str, event_id: object = None) -> tuple[bytes, bytes]:
    """Return the bytes before and after an event's data, for data that is sent in pieces."""
    tail = b"\n\n" if event_id is None else b"\nid: %b\n\n" % str(event_id).encode()
    return b"event: %b\ndata: " % name.encode(), tail
