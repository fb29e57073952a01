"""Send large data in pieces, so that other requests are served in between."""

from __future__ import annotations

from collections.abc import Iterator

from belay_server.runtime.turns import wait_for_turn

#: Data is sent in pieces of at most this size.
PIECE_BYTES = 256 * 1024


def pieces(data: bytes) -> Iterator[bytes]:
    """Yield data in pieces, and yield to other requests between them: sending to a client on a fast
    connection never waits."""
    for at in range(0, len(data), PIECE_BYTES):
        if at:
            wait_for_turn()
        yield data[at : at + PIECE_BYTES]
