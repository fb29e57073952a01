"""`make bench`: measures the speed of Belay against its targets and against another Agent Server.

It starts a whole server with one web process and one worker. Everything (client, web, worker,
Postgres, Valkey) shares the machine. With `BASELINE=http://…` another server on this machine, which
serves `tests/bench/project`, is measured in turn with the same client, scenario by scenario. Ratios
then hold on any machine, absolute figures only on the one that is named.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from langgraph_sdk import get_sync_client

from tests.bench.process_cost import ProcessTree, listener
from tests.bench.scenarios import SCENARIOS, Figures, Target, in_parallel
from tests.servers import LiveServer

CONFIG = Path(__file__).parent / "project" / "langgraph.json"
#: Runs at once that share hosts in a worker: the default, and for scenarios with many.
CONCURRENCY = 200
WIDE_CONCURRENCY = 1000
WIDE = ("sleeping", "thousand", "tokens")
IDLE = "an idle worker"
CPU = "CPU of a trivial run, whole tree"
#: How much of LangGraph's own CPU time a run may take, without a saver.
MOST_OF_BARE = 3.5
FLOOR_SECONDS = 5.0
#: Scenarios whose rows have a ratio; the baseline is not measured in the others. (LangGraph's own
#: server takes many minutes to accept 5,000 listeners.)
COMPARED = ("one", "many", "threads", "background", "sleeping", "first", "tokens")
#: Scenarios that only take samples: the baseline, which needs a second for each, takes fewer.
SAMPLED = ("one", "first")


@dataclass(frozen=True)
class Row:
    """A row of the table. `ratio` is to the baseline, `target` for a machine of two cores; None if
    there is none."""

    name: str
    unit: str
    more_is_better: bool
    target: float | None
    ratio: float | None = None

    def holds(self, measured: float, target: float) -> bool:
        return measured >= target if self.more_is_better else measured <= target


ROWS = (
    Row("create + wait, one at a time, p50", "ms", False, 10, 1 / 100),
    Row("create + wait, 32 clients", "runs/s", True, None, 3),
    Row("thread + run + wait, 32 clients", "runs/s", True, None, 3),
    Row("1,000 background runs, enqueued", "runs/s", True, None, 3),
    Row("1,000 background runs, drained", "runs/s", True, None, 6),
    Row("300 runs that sleep 2 s", "s", False, 3),
    Row("300 runs that sleep 2 s, memory", "MB", False, 500),
    Row("1,000 runs that sleep, worker", "MB", False, 400),
    Row("1,000 running runs stopped by one call", "s", False, 1),
    Row("first event, p50", "ms", False, 12),
    Row("first event, p99", "ms", False, 25),
    Row("50 streams of 200 tokens", "events/s", True, None, 8),
    Row("50 streams of 200 tokens, first event p50", "ms", False, 100),
    Row("500 idle listeners, each", "KB", False, 12),
    Row("2,000 idle listeners, each", "KB", False, 12),
    Row("5,000 idle listeners, each", "KB", False, 12),
    Row("150th run of a thread, to the 5th", "x", False, 1.2),
    Row("1,000th run of a thread, to the 5th", "x", False, 1.5),
    Row(IDLE, "MB", False, 200),
    Row(CPU, "ms", False, None),
)


async def drive(target: Target, name: str) -> Figures:
    async with target:
        # Warm up, so that the one-time setup of the workers is not measured.
        await in_parallel(64, 256, lambda _: target.wait())
        return await SCENARIOS[name](target)


@dataclass(frozen=True)
class Floor:
    """What a run of the trivial graph costs without a server."""

    cpu_ms: float
    runs_per_second: float

    @classmethod
    def measure(cls, server: LiveServer, seconds: float, *, saves: bool) -> Floor:
        """Run the graph on the same Postgres, or without a saver. Twice as many processes as cores
        keep every core as busy as the server's clients do: the same work takes more CPU on a busy
        core."""
        postmaster = psutil.Process(server.find("bin/postgres", "-D")[0].pid)
        url = server.database_url if saves else ""
        command = [sys.executable, "-m", "tests.bench.floor", url, str(seconds)]
        before = ProcessTree(postmaster.pid).cpu_seconds()
        processes = [
            subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            for _ in range(2 * (os.cpu_count() or 1))
        ]
        answers = [json.loads(process.communicate()[0]) for process in processes]
        postgres = ProcessTree(postmaster.pid).cpu_seconds() - before if saves else 0.0
        runs = sum(answer["runs"] for answer in answers)
        return cls(
            (sum(answer["cpu"] for answer in answers) + postgres) / runs * 1000,
            sum(answer["runs"] / answer["seconds"] for answer in answers),
        )


@dataclass(frozen=True)
class Floors:
    """LangGraph alone: without a saver, and with its own saver for Postgres."""

    bare: Floor
    saving: Floor


def table(ours: Figures, theirs: Figures, floors: Floors | None) -> list[str]:
    """Return the lines of the table in Markdown."""
    lines = ["| | measured | target | baseline | ratio | target |", "|---|---|---|---|---|---|"]
    for row in ROWS:
        if row.name not in ours:
            continue
        measured = ours[row.name]
        target = row.target
        if row.name == CPU and floors is not None:
            target = MOST_OF_BARE * floors.bare.cpu_ms
        cells = [row.name, f"{measured:,.4g} {row.unit}"]
        cells.append(
            f"{_limit(row, target)} {_mark(row.holds(measured, target))}" if target else ""
        )
        if row.name in theirs:
            ratio = measured / theirs[row.name]
            cells += [f"{theirs[row.name]:,.4g} {row.unit}", _as_ratio(ratio)]
            wanted = row.ratio
            cells.append(f"{_as_ratio(wanted)} {_mark(row.holds(ratio, wanted))}" if wanted else "")
        else:
            cells += ["", "", ""]
        lines.append("| " + " | ".join(cells) + " |")
    if floors is not None and CPU in ours:
        bare, saving = floors.bare, floors.saving
        lines += [
            "",
            f"LangGraph alone, on the same busy cores, takes {bare.cpu_ms:.2f} ms of CPU a run "
            f"without a saver, and {saving.cpu_ms:.2f} ms with its saver for Postgres "
            f"({saving.runs_per_second:.0f} runs/s). Belay takes {ours[CPU] / bare.cpu_ms:.1f} and "
            f"{ours[CPU] / saving.cpu_ms:.1f} times as much.",
        ]
    return lines


def _limit(row: Row, target: float) -> str:
    return f"{'≥' if row.more_is_better else '≤'} {target:,.4g}"


def _as_ratio(ratio: float) -> str:
    return f"{ratio:.1f} ×" if ratio >= 1 else f"1/{1 / ratio:.0f}"


def _mark(good: bool) -> str:
    return "✓" if good else "✗"


def machine() -> str:
    memory = psutil.virtual_memory().total / 2**30
    return f"{os.cpu_count()} cores, {memory:.0f} GB of memory, everything on this one machine"


@dataclass
class Bench:
    """The servers to measure, and the figures so far."""

    scale: float
    baseline: str | None
    baseline_pid: int | None
    ours: Figures = field(default_factory=dict)
    theirs: Figures = field(default_factory=dict)
    floors: Floors | None = None

    def run(self, scenarios: list[str], concurrency: int) -> None:
        """Run these scenarios on a new server, each followed by the baseline."""
        with tempfile.TemporaryDirectory(prefix="belay-bench-", dir="/tmp") as name:
            folder = Path(name)
            folder.chmod(0o755)
            server = LiveServer(
                folder / "data",
                config=CONFIG,
                BELAY_ISOLATION="auto",
                BELAY_SHARED_CONCURRENCY=str(concurrency),
            ).start()
            try:
                self._measure_idle(server, concurrency)
                for scenario in scenarios:
                    self._drive_both(server, scenario)
                if "many" in scenarios:
                    self.floors = Floors(
                        Floor.measure(server, FLOOR_SECONDS, saves=False),
                        Floor.measure(server, FLOOR_SECONDS, saves=True),
                    )
            finally:
                server.stop()

    def _measure_idle(self, server: LiveServer, concurrency: int) -> None:
        """Measure the memory of a worker of the default settings that has executed one run."""
        if concurrency == CONCURRENCY:
            with get_sync_client(url=server.url) as client:
                client.runs.wait(None, "trivial", input={"count": 1})
            self.ours[IDLE] = ProcessTree(server.worker_parent().pid).memory() / 1e6
            print(f"belay     {IDLE}: {self.ours[IDLE]:,.4g}", flush=True)

    def _drive_both(self, server: LiveServer, scenario: str) -> None:
        assert server.process is not None
        worker = ProcessTree(server.worker_parent().pid)
        belay = Target(server.url, ProcessTree(server.process.pid), self.scale, worker)
        self.ours |= _driven("belay", belay, scenario)
        if self.baseline is None or scenario not in COMPARED:
            return
        root = self.baseline_pid or listener(self.baseline)
        scale = self.scale * (0.2 if scenario in SAMPLED else 1.0)
        other = Target(self.baseline, ProcessTree(root), scale)
        self.theirs |= _driven("baseline", other, scenario)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--baseline", help="URL of another server, on this machine")
    parser.add_argument("--baseline-pid", type=int, help="its root process, if not the listener")
    parser.add_argument("--scenarios", nargs="*", default=list(SCENARIOS), choices=list(SCENARIOS))
    parser.add_argument("--scale", type=float, default=1.0, help="0.1: a tenth of everything")
    options = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    bench = Bench(options.scale, options.baseline, options.baseline_pid)
    for concurrency in (CONCURRENCY, WIDE_CONCURRENCY):
        scenarios = [
            scenario
            for scenario in options.scenarios
            if (scenario in WIDE) == (concurrency == WIDE_CONCURRENCY)
        ]
        if scenarios:
            bench.run(scenarios, concurrency)
    print(
        f"\n{machine()}; one web process, one worker whose hosts execute {CONCURRENCY} runs at "
        f"once, {WIDE_CONCURRENCY} where many are to go on at once ({', '.join(WIDE)})\n"
    )
    print("\n".join(table(bench.ours, bench.theirs, bench.floors)))
    return 0


def _driven(name: str, target: Target, scenario: str) -> Figures:
    figures = asyncio.run(drive(target, scenario))
    shown = ", ".join(f"{key}: {value:,.4g}" for key, value in figures.items())
    print(f"{name:<9} {shown}", flush=True)
    return figures


if __name__ == "__main__":
    sys.exit(main())
