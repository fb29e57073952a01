"""Run `make demo`: start a whole server, run the steps of the cancel guide, print the results.

Nothing is mocked: it uses the embedded Postgres and Valkey, Celery worker processes, and the
LangGraph SDK over HTTP. Its data is removed at the end.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from langgraph_sdk import get_client
from langgraph_sdk.client import LangGraphClient
from langgraph_sdk.errors import NotFoundError

from belay_server.configuration.settings import EXAMPLE_CONFIG
from belay_server.dev.embedded import free_port

_START_SECONDS = 60.0
_LONG: dict[str, Any] = {"messages": [{"role": "user", "content": "Long task"}]}


def main() -> int:
    """Run the demo with a server of its own. Return the server's exit code."""
    with tempfile.TemporaryDirectory(prefix="belay-demo-", dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        port = free_port()
        print(f"Starting API, worker, Postgres and Valkey on port {port} …")
        begun = time.monotonic()
        log = Path(folder) / "server.log"
        server = _start(port, Path(folder) / "data", log)
        try:
            _wait_until_up(server, port, log)
            print(f"  /ok answered after {time.monotonic() - begun:.1f} s\n")
            asyncio.run(_play(f"http://127.0.0.1:{port}"))
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(30)
        print(f"\nStopped, exit code {server.returncode}. Next: `make run`, and the README's tour.")
        return server.returncode


def _start(port: int, data_dir: Path, log: Path) -> subprocess.Popen[bytes]:
    environ = {k: v for k, v in os.environ.items() if k not in ("DATABASE_URL", "REDIS_URL")}
    environ["BELAY_CONFIG"] = str(EXAMPLE_CONFIG)
    command = [sys.executable, "-m", "belay_server", "dev", "--port", str(port)]
    command += ["--data-dir", str(data_dir), "--concurrency", "4"]
    with log.open("wb") as output:
        return subprocess.Popen(command, env=environ, stdout=output, stderr=output)  # noqa: S603


def _wait_until_up(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/ok", timeout=1):
                return
        except (OSError, urllib.error.URLError):
            time.sleep(0.05)
    sys.exit(f"the server did not start:\n{log.read_text()[-3000:]}")


async def _play(url: str) -> None:
    async with get_client(url=url) as client:
        await _wait_for_an_answer(client)
        await _stream(client)
        await _interrupt_and_resume(client)
        await _roll_back(client)
        await _cancel_many(client)
        await _cancel_on_disconnect(client)


async def _wait_for_an_answer(client: LangGraphClient) -> None:
    question: dict[str, Any] = {"messages": [{"role": "user", "content": "What is 20 + 22?"}]}
    values: Any = await client.runs.wait(None, "agent", input=question)
    print(f"1. Wait for a run.         20 + 22: {values['messages'][-1]['content']}")


async def _stream(client: LangGraphClient) -> None:
    thread = await client.threads.create()
    question: dict[str, Any] = {"messages": [{"role": "user", "content": "Hold the rope"}]}
    words = []
    async for part in client.runs.stream(
        thread["thread_id"], "agent", input=question, stream_mode="messages-tuple"
    ):
        if part.event == "messages" and part.data[0]["type"] == "AIMessageChunk":
            words.append(part.data[0]["content"])
    print(f"2. Stream a run.           {'|'.join(w for w in words if w)}")


async def _running(client: LangGraphClient, thread_id: str, run_id: str) -> None:
    while (await client.runs.get(thread_id, run_id))["status"] != "running":
        await asyncio.sleep(0.01)


async def _interrupt_and_resume(client: LangGraphClient) -> None:
    thread_id = (await client.threads.create())["thread_id"]
    run = await client.runs.create(thread_id, "long_task", input={"seconds": 0.5})
    async for part in client.runs.join_stream(thread_id, run["run_id"]):
        if part.event == "values" and part.data.get("steps"):
            break
    begun = time.monotonic()
    await client.runs.cancel(thread_id, run["run_id"], wait=True)
    took = (time.monotonic() - begun) * 1000
    status = (await client.runs.get(thread_id, run["run_id"]))["status"]
    state: Any = await client.threads.get_state(thread_id)
    print(f"3. Cancel with interrupt.  stopped in {took:.0f} ms, run {status}; ", end="")
    print(f"done: {state['values']['steps']}, next: {state['next']}")
    values: Any = await client.runs.wait(thread_id, "long_task", input=None)
    print(f"   Resumed.                {values['steps']}")


async def _roll_back(client: LangGraphClient) -> None:
    thread_id = (await client.threads.create())["thread_id"]
    await client.runs.wait(thread_id, "approval", input={"request": "climb on"})
    before = await client.threads.get_state(thread_id)
    run = await client.runs.create(thread_id, "agent", input=_LONG)
    await _running(client, thread_id, run["run_id"])
    await client.runs.cancel(thread_id, run["run_id"], action="rollback", wait=True)
    try:
        await client.runs.get(thread_id, run["run_id"])
        found = "still there"
    except NotFoundError:
        found = "gone"
    same = before == await client.threads.get_state(thread_id)
    print(f"4. Cancel with rollback.   run {found}, thread exactly as before: {same}")


async def _cancel_many(client: LangGraphClient) -> None:
    thread_ids = [(await client.threads.create())["thread_id"] for _ in range(3)]
    runs = [await client.runs.create(t, "agent", input=_LONG) for t in thread_ids]
    for thread_id, run in zip(thread_ids, runs, strict=True):
        await _running(client, thread_id, run["run_id"])
    await client.runs.cancel_many(status="running")
    for thread_id, run in zip(thread_ids, runs, strict=True):
        await client.runs.join(thread_id, run["run_id"])
    statuses = [
        (await client.runs.get(thread_id, run["run_id"]))["status"]
        for thread_id, run in zip(thread_ids, runs, strict=True)
    ]
    print(f"5. Cancel by status.       {statuses}")


async def _cancel_on_disconnect(client: LangGraphClient) -> None:
    thread_id = (await client.threads.create())["thread_id"]
    async for part in client.runs.stream(thread_id, "agent", input=_LONG, on_disconnect="cancel"):
        if part.event == "values":
            break  # closes the client's connection
    run = (await client.runs.list(thread_id))[0]
    begun = time.monotonic()
    while run["status"] != "interrupted":
        await asyncio.sleep(0.005)
        run = (await client.runs.list(thread_id))[0]
    took = (time.monotonic() - begun) * 1000
    print(f"6. Cancel on disconnect.   run {run['status']} after {took:.0f} ms")


if __name__ == "__main__":
    sys.exit(main())
