"""Bursts of requests: more than the connections to Postgres can serve at once."""

from __future__ import annotations

import asyncio
import re

import aiohttp
import pytest

from tests.acceptance.playing import stops_all

__all__ = ["stops_all"]
LATER = {"assistant_id": "counter", "input": {"count": 1}, "after_seconds": 3600}
_CREATES_PER_CONNECTION = 4


@pytest.mark.parametrize("connections", [50, pytest.param(500, marks=pytest.mark.long)])
def test_every_create_of_a_burst_is_accepted(server, http, stops_all, connections):
    """Each connection sends its next create when the one before it has been answered."""

    async def creates(session: aiohttp.ClientSession) -> list[tuple[str, str]]:
        found = []
        for _ in range(_CREATES_PER_CONNECTION):
            async with session.post(f"{server.url}/runs", json=LATER) as answer:
                text = await answer.text()
                assert answer.status == 200, text
                run = await answer.json()
                found.append((run["created_at"], run["run_id"]))
        return found

    async def burst() -> list[list[tuple[str, str]]]:
        connector = aiohttp.TCPConnector(limit=connections)
        timeout = aiohttp.ClientTimeout(total=300)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            return await asyncio.gather(*(creates(session) for _ in range(connections)))

    found = asyncio.run(burst())
    accepted = [run for of_connection in found for run in of_connection]
    assert len({run_id for _, run_id in accepted}) == connections * _CREATES_PER_CONNECTION
    for of_connection in found:
        assert of_connection == sorted(of_connection)
    waits = re.search(
        r"^belay_database_wait_seconds_count (\S+)", http.get("/metrics").text, re.MULTILINE
    )
    assert waits is not None
    assert float(waits[1]) >= len(accepted)
