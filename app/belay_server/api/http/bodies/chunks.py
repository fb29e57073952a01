"""Send large data in chunks, so that other requests are served in between."""

from __future__ import annotations

from collections.abc import Iterator

from belay_server.runtime.turns import wait_for_turn

#: Data is sent in chunks of at most this size.
CHUNK_BYTES = 256 * 1024


def in_chunks(data: bytes) -> Iterator[bytes]:
    """Yield data in chunks, and yield to other requests between them: sending to a client on a fast
    connection never waits."""
    for at in range(0, len(data), CHUNK_BYTES):
        if at:
            wait_for_turn()
        yield data[at : at + CHUNK_BYTES]
