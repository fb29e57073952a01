"""The probe: four steps that record who executes what and when, independent of the servers.

Each start and end is one JSON line, appended to the file that the input names: run, tag, attempt,
node, event, pid, clock. The file survives every process and server that a fault may kill. The state
has an entry `<tag>:<node>` for each step, so that a lost or duplicated run shows there too.
"""

from __future__ import annotations

import asyncio
import json
import operator
import os
import signal
import time
from typing import Annotated, TypedDict

from graphs.steps import chain


class State(TypedDict, total=False):
    tag: str
    history: str
    seconds: float
    fails: bool
    crashes: bool
    stops: bool
    done: Annotated[list[str], operator.add]


def record(state: State, config, node: str, event: str) -> None:
    line = {
        "run": str(config["configurable"].get("run_id") or config["metadata"].get("run_id")),
        "tag": state.get("tag", ""),
        "attempt": config["metadata"].get("run_attempt"),
        "node": node,
        "event": event,
        "pid": os.getpid(),
        "t": time.monotonic(),
    }
    fd = os.open(state["history"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.write(fd, json.dumps(line).encode() + b"\n")
    finally:
        os.close(fd)


def _finish(state: State, config, name: str) -> State:
    if name == "s3" and state.get("fails"):
        raise ValueError("the probe was told to fail")
    record(state, config, name, "end")
    return {"done": [f"{state.get('tag', '')}:{name}"]}


def _async_step(name: str):
    async def step(state: State, config) -> State:
        record(state, config, name, "start")
        if name == "s2" and state.get("stops"):
            os.kill(os.getpid(), signal.SIGSTOP)
        await asyncio.sleep(state.get("seconds", 0.0))
        return _finish(state, config, name)

    return step


def _sync_step(name: str):
    def step(state: State, config) -> State:
        record(state, config, name, "start")
        if name == "s2" and state.get("crashes"):
            os._exit(1)
        time.sleep(state.get("seconds", 0.0))
        return _finish(state, config, name)

    return step


probe = chain(State, _async_step)
sync_probe = chain(State, _sync_step)
