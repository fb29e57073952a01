"""Every method of the SDK's clients, option by option, against a live server.

`TABLE` is complete: a test reads the SDK's classes and fails if a method or an option has no row.
Each row fails if it does not pass the options that it covers. The same rows test the sync client
and, through `Blocking`, the async one.
"""

from __future__ import annotations

import asyncio
import inspect
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import httpx
import langgraph_sdk.client as sdk_classes
import pytest
from langgraph_sdk import get_client, get_sync_client
from langgraph_sdk.errors import ConflictError, NotFoundError

from tests.acceptance.playing import stops_all
from tests.conformance import watched
from tests.long_forms import long_case
from tests.waiting import wait_until

__all__ = ["stops_all"]

CLIENTS = {
    "assistants": "AssistantsClient",
    "threads": "ThreadsClient",
    "runs": "RunsClient",
    "crons": "CronClient",
    "store": "StoreClient",
}
#: Options of every method, which concern HTTP and not the method.
OF_EVERY_METHOD = {"self", "headers", "params"}
NEVER_SOON = "0 0 1 1 *"
EVERY_SECOND = "* * * * * *"
WEBHOOK = "https://example.com/hook"


# --- the table --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    client: str
    method: str
    options: frozenset[str]
    check: Callable[[Sdk], None]

    def __str__(self) -> str:
        return f"{self.client}.{self.method}-{self.check.__name__}"


TABLE: list[Row] = []


def row(client: str, methods: str, *options: str):
    """Register a check of some options; for several methods, the check gets each `method`."""

    def add(check: Callable[..., None]) -> Callable[..., None]:
        names = methods.split()
        for name in names:
            bound = check if len(names) == 1 else partial(check, method=name)
            bound.__name__ = check.__name__  # type: ignore[attr-defined]
            TABLE.append(Row(client, name, frozenset(options), bound))
        return check

    return add


# --- the two clients behind one interface -------------------------------------------------------


class Sdk:
    """A client whose calls block and are recorded."""

    def __init__(self, client: Any, unfold: Callable[[Any], Any], impatient: Any) -> None:
        self._client = client
        self._unfold = unfold
        self._impatient = impatient
        self.passed: set[tuple[str, str, str]] = set()

    def __getattr__(self, name: str) -> Any:
        return _Namespace(self, name, getattr(self._client, name))

    def talked(self, talk: Any, input: Any) -> tuple[list[Any], Any]:
        """Return the values that a run streams to a thread's session, and its final values."""
        scene = _talk_async if hasattr(talk, "__aenter__") else _talk
        found: tuple[list[Any], Any] = self._unfold(scene(talk, input))
        return found

    @contextmanager
    def impatient(self) -> Iterator[Sdk]:
        """Yield the same client with a timeout of half a second."""
        with self._impatient() as other:
            other.passed = self.passed
            yield other


def _talk(talk: Any, input: Any) -> tuple[list[Any], Any]:
    with talk:
        talk.run.start(input=input)
        return list(talk.values), talk.output


async def _talk_async(talk: Any, input: Any) -> tuple[list[Any], Any]:
    async with talk:
        await talk.run.start(input=input)
        return [values async for values in talk.values], await talk.output


@dataclass
class _Namespace:
    sdk: Sdk
    name: str
    client: Any

    def __getattr__(self, method: str) -> Callable[..., Any]:
        function = getattr(self.client, method)

        def call(*args: Any, **kwargs: Any) -> Any:
            given = inspect.signature(function).bind(*args, **kwargs).arguments
            self.sdk.passed |= {(self.name, method, option) for option in given}
            return self.sdk._unfold(function(*args, **kwargs))

        return call


@dataclass
class Blocking:
    """Runs awaitables and async iterators of the async client in one event loop, step by step."""

    runner: asyncio.Runner = field(default_factory=asyncio.Runner)

    def __call__(self, answer: Any) -> Any:
        if inspect.isawaitable(answer):
            answer = self.runner.run(_awaited(answer))
        return self._steps(answer) if hasattr(answer, "__anext__") else answer

    def _steps(self, stream: Any) -> Iterator[Any]:
        try:
            while True:
                try:
                    part = self.runner.run(_awaited(anext(stream)))
                except StopAsyncIteration:
                    return
                yield part
        finally:
            self.runner.run(_awaited(stream.aclose()))


async def _awaited(answer: Any) -> Any:
    return await answer


@contextmanager
def sync_sdk(url: str, **how: Any) -> Iterator[Sdk]:
    with watched(get_sync_client(url=url, **how)) as client:
        yield Sdk(client, lambda answer: answer, partial(sync_sdk, url, timeout=0.5))


@contextmanager
def async_sdk(url: str, **how: Any) -> Iterator[Sdk]:
    unfold = Blocking()
    with unfold.runner:
        client = watched(get_client(url=url, **how))
        yield Sdk(client, unfold, partial(async_sdk, url, timeout=0.5))
        unfold.runner.run(client.aclose())


@pytest.fixture(params=[sync_sdk, long_case(async_sdk)], ids=["sync", "async"])
def sdk(request, server, stops_all):
    with request.param(server.url) as made:
        yield made


# --- completeness -----------------------------------------------------------------------------


def options_of(prefix: str) -> set[tuple[str, str, str]]:
    """Return client, method and option of all public methods; "" stands for no option."""
    found = set()
    for client, name in CLIENTS.items():
        for method, function in inspect.getmembers(
            getattr(sdk_classes, prefix + name), inspect.isfunction
        ):
            if method.startswith("_"):
                continue
            parameters = inspect.signature(function).parameters.values()
            optional = {p.name for p in parameters if p.default is not p.empty}
            found |= {(client, method, option) for option in {"", *optional} - OF_EVERY_METHOD}
    return found


@pytest.mark.parametrize("prefix", ["", "Sync"])
def test_the_table_has_every_method_and_every_option(prefix):
    rows = {(row.client, row.method, option) for row in TABLE for option in {"", *row.options}}
    assert options_of(prefix) - rows == set()
    assert {(c, m) for c, m, _ in rows} == {(c, m) for c, m, _ in options_of(prefix)}


def test_the_table_covers_every_part_of_a_client():
    for client in (get_sync_client(url="http://localhost"), get_client(url="http://localhost")):
        parts = {name for name in vars(client) if not name.startswith("_")}
        assert parts == {*CLIENTS, "http"}


@pytest.mark.parametrize("row", TABLE, ids=str)
def test_each_method_works_with_its_options(sdk, row):
    row.check(sdk)
    wanted = {(row.client, row.method, option) for option in row.options}
    assert wanted - sdk.passed == set(), "the row stands for options that it does not pass"
    assert (row.client, row.method) in {(c, m) for c, m, _ in sdk.passed}


# --- helpers ----------------------------------------------------------------------------------


def tag() -> dict[str, str]:
    """Return metadata that only one test has."""
    return {"tag": uuid.uuid4().hex}


def new_thread(sdk: Sdk, **options: Any) -> str:
    return sdk.threads.create(**options)["thread_id"]


def counted(sdk: Sdk, *counts: int) -> str:
    """Create a thread on which `counter` was run from each of these counts."""
    thread_id = new_thread(sdk)
    for count in counts:
        sdk.runs.wait(thread_id, "counter", input={"count": count})
    return thread_id


def outcome(sdk: Sdk, method: str, thread_id: str | None, graph: str, **options: Any) -> Any:
    """Return the values of a run, or its error, whichever method creates it."""
    if method == "wait":
        return sdk.runs.wait(thread_id, graph, **options)
    if method == "stream":
        parts = list(sdk.runs.stream(thread_id, graph, **options))
        assert parts[0].event == "metadata"
        error = next((part.data for part in parts if part.event == "error"), None)
        return {"__error__": error} if error else parts[-1].data
    run = sdk.runs.create(thread_id, graph, **options)
    return sdk.runs.join(run["thread_id"], run["run_id"])


@contextmanager
def refused(status: int) -> Iterator[None]:
    """Expect an error: `wait` raises httpx's own, other methods the SDK's, a subclass of it."""
    with pytest.raises(httpx.HTTPStatusError) as refusal:
        yield
    assert refusal.value.response.status_code == status


def last_run(sdk: Sdk, thread_id: str) -> dict[str, Any]:
    return sdk.runs.list(thread_id)[0]


def running(sdk: Sdk, thread_id: str | None = None, seconds: float = 30) -> dict[str, Any]:
    """Start a slow run and return it once it is running."""
    thread_id = thread_id or new_thread(sdk)
    run = sdk.runs.create(thread_id, "steps", input={"seconds": seconds})
    until_status(sdk, run, "running")
    return run


def until_status(sdk: Sdk, run: dict[str, Any], status: str) -> None:
    ids = run["thread_id"], run["run_id"]
    wait_until(lambda: sdk.runs.get(*ids)["status"] == status, 20, f"the run to be {status}")


def ids_of(items: list[dict[str, Any]], kind: str) -> list[str]:
    return [item[f"{kind}_id"] for item in items]


# --- assistants -------------------------------------------------------------------------------


@row("assistants", "get")
def is_found_by_its_id(sdk):
    made = sdk.assistants.create("counter")
    assert sdk.assistants.get(made["assistant_id"]) == made


@row("assistants", "create", "config", "metadata", "assistant_id", "name", "description")
def is_created_with_its_fields(sdk):
    wanted = {
        "config": {"configurable": {"by": 3}, "tags": ["t"]},
        "metadata": tag(),
        "assistant_id": str(uuid.uuid4()),
        "name": "threes",
        "description": "counts by three",
    }
    made = sdk.assistants.create("counter", **wanted)
    assert {name: made[name] for name in wanted} == wanted
    answer = sdk.runs.wait(None, made["assistant_id"], input={"count": 1})
    assert answer == {"count": 4}


@row("assistants", "create", "context")
def uses_its_context(sdk):
    made = sdk.assistants.create("teller", context={"voice": "loud"})
    answer = sdk.runs.wait(None, made["assistant_id"], input={"topic": "tea"})
    assert answer == {"told": "loud tea"}


@row("assistants", "create", "if_exists")
def is_created_once(sdk):
    made = sdk.assistants.create("counter", name="first")
    again = {"assistant_id": made["assistant_id"], "name": "second"}
    with pytest.raises(ConflictError):
        sdk.assistants.create("counter", **again, if_exists="raise")
    assert sdk.assistants.create("counter", **again, if_exists="do_nothing") == made


@row("assistants", "update", "graph_id", "config", "metadata", "name", "description")
def is_changed(sdk):
    made = sdk.assistants.create("counter", metadata={"a": 1})
    wanted = {
        "graph_id": "made",
        "config": {"configurable": {"by": 7}},
        "name": "sevens",
        "description": "counts by seven",
    }
    changed = sdk.assistants.update(made["assistant_id"], metadata={"b": 2}, **wanted)
    assert {name: changed[name] for name in wanted} == wanted
    assert changed["metadata"].items() >= {"a": 1, "b": 2}.items()
    assert changed["version"] == 2
    answer = sdk.runs.wait(None, made["assistant_id"], input={"count": 1})
    assert answer == {"count": 8}


@row("assistants", "update", "context")
def updates_its_context(sdk):
    made = sdk.assistants.create("teller", context={"voice": "loud"})
    sdk.assistants.update(made["assistant_id"], context={"voice": "low"})
    answer = sdk.runs.wait(None, made["assistant_id"], input={"topic": "tea"})
    assert answer == {"told": "low tea"}


@row("assistants", "delete", "delete_threads")
def is_deleted_with_its_threads_if_asked(sdk):
    for delete_threads in (False, True):
        made = sdk.assistants.create("counter")
        thread_id = new_thread(sdk)
        sdk.runs.wait(thread_id, made["assistant_id"], input={"count": 1})
        sdk.assistants.delete(made["assistant_id"], delete_threads=delete_threads)
        with pytest.raises(NotFoundError):
            sdk.assistants.get(made["assistant_id"])
        found = sdk.threads.search(ids=[thread_id])
        assert ids_of(found, "thread") == ([] if delete_threads else [thread_id])


@row("assistants", "get_graph", "xray")
def is_drawn_with_its_subgraphs_if_asked(sdk):
    plain, deep = (
        [node["id"] for node in sdk.assistants.get_graph("family", xray=xray)["nodes"]]
        for xray in (False, 1)
    )
    assert "child" in plain
    assert "child:child_one" in deep


@row("assistants", "get_schemas")
def shows_its_schemas(sdk):
    schemas = sdk.assistants.get_schemas("counter")
    assert schemas["graph_id"] == "counter"
    assert schemas["input_schema"]["properties"].keys() == {"count", "by", "note"}


@row("assistants", "get_subgraphs", "namespace", "recurse")
def shows_its_subgraphs(sdk):
    top = sdk.assistants.get_subgraphs("onion", recurse=False)
    whole = sdk.assistants.get_subgraphs("onion", recurse=True)
    assert top.keys() < whole.keys()
    (name, *_) = top
    assert sdk.assistants.get_subgraphs("onion", namespace=name) == {name: top[name]}


@row("assistants", "get_versions", "metadata", "limit", "offset")
def lists_its_versions(sdk):
    made = sdk.assistants.create("counter", name="one", metadata={"n": 1})
    for n in (2, 3):
        sdk.assistants.update(made["assistant_id"], name=str(n), metadata={"n": n})

    def versions(**which):
        found = sdk.assistants.get_versions(made["assistant_id"], **which)
        return [version["version"] for version in found]

    assert versions() == [3, 2, 1]
    assert versions(metadata={"n": 2}) == [2]
    assert versions(limit=1, offset=1) == [2]


@row("assistants", "set_latest")
def restores_an_earlier_version(sdk):
    made = sdk.assistants.create("counter", name="one")
    sdk.assistants.update(made["assistant_id"], name="two")
    assert sdk.assistants.set_latest(made["assistant_id"], 1)["name"] == "one"
    assert sdk.assistants.get(made["assistant_id"])["name"] == "one"


@row(
    *("assistants", "search", "metadata", "graph_id", "name", "limit", "offset"),
    *("sort_by", "sort_order", "select"),
)
def is_searched(sdk):
    mine = tag()
    one = sdk.assistants.create("counter", metadata=mine, name="b")
    two = sdk.assistants.create("steps", metadata=mine, name="a")
    ids = [one["assistant_id"], two["assistant_id"]]

    def found(**which):
        return ids_of(sdk.assistants.search(metadata=mine, **which), "assistant")

    assert found(sort_by="created_at", sort_order="asc") == ids
    assert found(sort_by="name", sort_order="asc") == ids[::-1]
    assert found(sort_by="created_at", sort_order="asc", limit=1) == ids[:1]
    assert found(sort_by="created_at", sort_order="asc", offset=1) == ids[1:]
    assert found(graph_id="steps") == ids[1:]
    assert found(name="b") == ids[:1]
    (chosen,) = sdk.assistants.search(metadata=mine, name="b", select=["name", "graph_id"])
    assert chosen == {"name": "b", "graph_id": "counter"}


@row("assistants", "search", "response_format")
def reports_the_next_page(sdk):
    mine = tag()
    for _ in range(2):
        sdk.assistants.create("counter", metadata=mine)
    page = sdk.assistants.search(metadata=mine, limit=1, response_format="object")
    assert (len(page["assistants"]), page["next"]) == (1, "1")
    whole = sdk.assistants.search(metadata=mine, response_format="object")
    assert (len(whole["assistants"]), whole["next"]) == (2, None)
    assert isinstance(sdk.assistants.search(metadata=mine, response_format="array"), list)


@row("assistants", "count", "metadata", "graph_id", "name")
def is_counted(sdk):
    mine = tag()
    sdk.assistants.create("counter", metadata=mine, name="b")
    sdk.assistants.create("steps", metadata=mine, name="a")
    assert sdk.assistants.count(metadata=mine) == 2
    assert sdk.assistants.count(metadata=mine, graph_id="steps") == 1
    assert sdk.assistants.count(metadata=mine, name="b") == 1


# --- threads ----------------------------------------------------------------------------------


@row("threads", "create", "metadata", "thread_id", "if_exists", "graph_id")
def is_created_once_with_its_id(sdk):
    mine, thread_id = tag(), str(uuid.uuid4())
    made = sdk.threads.create(metadata=mine, thread_id=thread_id, graph_id="counter")
    assert made["thread_id"] == thread_id
    assert made["metadata"] == {**mine, "graph_id": "counter"}
    with pytest.raises(ConflictError):
        sdk.threads.create(thread_id=thread_id, if_exists="raise")
    assert sdk.threads.create(thread_id=thread_id, if_exists="do_nothing") == made


@row("threads", "create", "supersteps")
def is_created_with_supersteps(sdk):
    steps = [
        {"updates": [{"values": {"count": 1}, "as_node": "__input__"}]},
        {"updates": [{"values": {"count": 5}, "as_node": "inc"}]},
    ]
    thread_id = new_thread(sdk, graph_id="counter", supersteps=steps)
    assert sdk.threads.get_state(thread_id)["values"] == {"count": 5}
    assert len(sdk.threads.get_history(thread_id)) == 2


@row("threads", "create", "ttl")
@row("threads", "get", "include")
def expires_after_its_ttl(sdk):
    thread_id = new_thread(sdk, ttl={"ttl": 30, "strategy": "delete"})
    ttl = sdk.threads.get(thread_id, include=["ttl"])["ttl"]
    assert (ttl["strategy"], ttl["ttl_minutes"]) == ("delete", 30)
    left = datetime.fromisoformat(ttl["expires_at"]) - datetime.now(UTC)
    assert timedelta(minutes=29) < left < timedelta(minutes=31)
    assert "ttl" not in sdk.threads.get(thread_id)


@row("threads", "update", "ttl", "return_minimal")
def merges_metadata(sdk):
    thread_id = new_thread(sdk, metadata={"a": 1})
    changed = sdk.threads.update(thread_id, metadata={"b": 2}, ttl=5)
    assert changed["metadata"] == {"a": 1, "b": 2}
    assert sdk.threads.get(thread_id, include=["ttl"])["ttl"]["ttl_minutes"] == 5
    assert sdk.threads.update(thread_id, metadata={"c": 3}, return_minimal=True) is None
    assert sdk.threads.get(thread_id)["metadata"] == {"a": 1, "b": 2, "c": 3}


@row("threads", "delete")
def is_not_found_after_its_deletion(sdk):
    thread_id = counted(sdk, 1)
    sdk.threads.delete(thread_id)
    with pytest.raises(NotFoundError):
        sdk.threads.get(thread_id)


@row(
    *("threads", "search", "metadata", "values", "ids", "status", "limit", "offset"),
    *("sort_by", "sort_order", "select", "extract"),
)
def is_searched_by_every_filter(sdk):
    mine = tag()
    one, two = (new_thread(sdk, metadata=mine) for _ in range(2))
    sdk.runs.wait(two, "counter", input={"count": 1}, interrupt_before=["inc"])

    def found(**which):
        return ids_of(sdk.threads.search(metadata=mine, **which), "thread")

    assert found(sort_by="created_at", sort_order="asc") == [one, two]
    assert found(sort_by="created_at", sort_order="desc", limit=1) == [two]
    assert found(sort_by="created_at", sort_order="desc", offset=1) == [one]
    assert found(values={"count": 1}) == [two]
    assert found(ids=[one]) == [one]
    assert found(status="interrupted") == [two]
    (chosen,) = sdk.threads.search(ids=[two], select=["thread_id", "status"])
    assert chosen == {"thread_id": two, "status": "interrupted"}
    (taken,) = sdk.threads.search(ids=[two], extract={"n": "values.count"})
    assert taken["extracted"] == {"n": 1}


@row("threads", "count", "metadata", "values", "status")
def is_counted_by_every_filter(sdk):
    mine = tag()
    new_thread(sdk, metadata=mine)
    asked = new_thread(sdk, metadata=mine)
    sdk.runs.wait(asked, "counter", input={"count": 1}, interrupt_before=["inc"])
    assert sdk.threads.count(metadata=mine) == 2
    assert sdk.threads.count(metadata=mine, values={"count": 1}) == 1
    assert sdk.threads.count(metadata=mine, status="interrupted") == 1


@row("threads", "copy")
def is_copied(sdk):
    thread_id = counted(sdk, 1)
    copy = sdk.threads.copy(thread_id)
    assert copy["thread_id"] != thread_id
    assert sdk.threads.get_state(copy["thread_id"])["values"] == {"count": 2}
    assert sdk.runs.list(copy["thread_id"]) == []


@row("threads", "prune", "strategy")
def is_pruned(sdk):
    kept, gone = counted(sdk, 1, 5), counted(sdk, 1)
    assert sdk.threads.prune([kept], strategy="keep_latest") == {"pruned_count": 1}
    (state,) = sdk.threads.get_history(kept)
    assert state["values"] == {"count": 6}
    assert sdk.threads.prune([gone], strategy="delete") == {"pruned_count": 1}
    with pytest.raises(NotFoundError):
        sdk.threads.get(gone)


@row("threads", "get_state", "checkpoint", "checkpoint_id", "select")
def shows_its_state_now_and_at_a_checkpoint(sdk):
    thread_id = counted(sdk, 1, 5)
    now = sdk.threads.get_state(thread_id)
    assert now["values"] == {"count": 6}
    then = sdk.threads.get_history(thread_id)[3]
    assert (then["values"], then["next"]) == ({"count": 2}, [])
    for where in ({"checkpoint": then["checkpoint"]}, {"checkpoint_id": then["checkpoint_id"]}):
        assert sdk.threads.get_state(thread_id, **where) == then
        chosen = sdk.threads.get_state(thread_id, **where, select=["next", "values.count"])
        assert chosen == {"next": [], "values": {"count": 2}}
    assert sdk.threads.get_state(thread_id, select=["next"]) == {"next": []}


@row("threads", "get_state", "subgraphs")
def shows_the_state_of_its_subgraphs(sdk):
    thread_id = new_thread(sdk)
    sdk.runs.wait(thread_id, "family", input={"ask": True})
    (with_state,) = sdk.threads.get_state(thread_id, subgraphs=True)["tasks"]
    (without,) = sdk.threads.get_state(thread_id, subgraphs=False)["tasks"]
    assert with_state["state"]["next"] == ["child_two"]
    assert without["state"] is None


@row("threads", "update_state", "as_node", "checkpoint", "checkpoint_id")
def has_its_state_updated(sdk):
    thread_id = new_thread(sdk)
    sdk.runs.wait(thread_id, "steps", input={}, interrupt_after=["s1"])
    at_s1 = sdk.threads.get_state(thread_id)
    written = sdk.threads.update_state(thread_id, {"tag": "x"}, as_node="s3")
    assert sdk.threads.get_state(thread_id)["next"] == ["s4"]
    assert written["checkpoint"]["checkpoint_id"] == written["checkpoint_id"]
    for where in (
        {"checkpoint": at_s1["checkpoint"]},
        {"checkpoint_id": at_s1["checkpoint_id"]},
    ):
        sdk.threads.update_state(thread_id, {"tag": "y"}, **where)
        state = sdk.threads.get_state(thread_id)
        assert (state["next"], state["values"]["tag"]) == (["s2"], "y")
        assert state["parent_checkpoint"]["checkpoint_id"] == at_s1["checkpoint_id"]


@row("threads", "get_history", "limit", "before", "metadata", "checkpoint", "select")
def shows_its_history(sdk):
    thread_id = counted(sdk, 1, 5)
    whole = sdk.threads.get_history(thread_id)
    assert [state["values"].get("count") for state in whole[:1]] == [6]
    assert sdk.threads.get_history(thread_id, limit=2) == whole[:2]
    assert sdk.threads.get_history(thread_id, before=whole[1]["checkpoint"]) == whole[2:]
    first = sdk.threads.get_history(thread_id, metadata={"step": -1})
    assert first == [state for state in whole if state["metadata"]["step"] == -1]
    chosen = sdk.threads.get_history(thread_id, limit=1, select=["next"])
    assert chosen == [{"next": []}]
    sdk.runs.wait(thread_id, "family", input={})
    of_child = sdk.threads.get_history(thread_id, checkpoint={"checkpoint_ns": "child"})
    assert {state["checkpoint"]["checkpoint_ns"] for state in of_child} == {"child"}


@row("threads", "join_stream", "last_event_id", "stream_mode")
def is_streamed_and_resumed(sdk):
    thread_id = new_thread(sdk)
    run = sdk.runs.create(thread_id, "counter", input={"count": 1}, stream_resumable=True)
    sdk.runs.join(thread_id, run["run_id"])
    from_the_start = {"last_event_id": "-", "stream_mode": "lifecycle"}
    followed = sdk.threads.join_stream(thread_id, **from_the_start)
    started, ended = next(followed), next(followed)
    followed.close()
    assert started.data == {"run_id": run["run_id"], "attempt": 1}
    assert ended.data == {"status": "run_done", "run_id": run["run_id"]}
    resumed = sdk.threads.join_stream(
        thread_id, last_event_id=started.id, stream_mode=["run_modes"]
    )
    assert (next(resumed).event, next(resumed).data) == ("values", {"count": 2})
    resumed.close()


@row("threads", "stream", "thread_id", "transport", "run_start_timeout")
def is_streamed_over_each_transport(sdk):
    for transport in ("sse", "websocket"):
        talk = sdk.threads.stream(
            str(uuid.uuid4()),
            assistant_id="counter",
            transport=transport,
            run_start_timeout=20.0,
        )
        values, output = sdk.talked(talk, {"count": 1})
        assert values[-1] == output == {"count": 2}


@row("threads", "stream")
def creates_its_own_thread(sdk):
    talk = sdk.threads.stream(assistant_id="counter")
    assert sdk.talked(talk, {"count": 3})[1] == {"count": 4}
    assert sdk.threads.get_state(talk.thread_id)["values"] == {"count": 4}


# --- runs, by each method that creates one --------------------------------------------------------

MAKES_A_RUN = "create wait stream"


@row("runs", MAKES_A_RUN, "input")
def counts_from_its_input(sdk, method):
    thread_id = new_thread(sdk)
    for where in (thread_id, None):
        assert outcome(sdk, method, where, "counter", input={"count": 1}) == {"count": 2}


@row("runs", MAKES_A_RUN, "command")
def resumes_an_interrupt(sdk, method):
    thread_id = new_thread(sdk)
    sdk.runs.wait(thread_id, "questions", input={"topic": "tea"})
    answer = outcome(sdk, method, thread_id, "questions", command={"resume": "one"})
    (question,) = answer["__interrupt__"]
    assert question["value"] == {"question": "second about tea?"}


@row("runs", MAKES_A_RUN, "strict_resume")
def fails_to_resume_an_unknown_interrupt(sdk, method):
    thread_id = new_thread(sdk)
    sdk.runs.wait(thread_id, "questions", input={"topic": "tea"})
    how = {"raise_error": False} if method == "wait" else {}
    command = {"resume": {"0" * 32: "one"}}
    answer = outcome(
        sdk, method, thread_id, "questions", command=command, strict_resume=True, **how
    )
    assert answer["__error__"]["error"] == "UnknownInterruptError"


@row("runs", MAKES_A_RUN, "metadata")
def carries_its_metadata(sdk, method):
    thread_id, mine = new_thread(sdk), tag()
    outcome(sdk, method, thread_id, "counter", input={"count": 1}, metadata=mine)
    assert last_run(sdk, thread_id)["metadata"].items() >= mine.items()


@row("runs", MAKES_A_RUN, "config")
def counts_by_its_config(sdk, method):
    config = {"configurable": {"by": 5}, "tags": ["t"]}
    thread_id = new_thread(sdk)
    answer = outcome(sdk, method, thread_id, "counter", input={"count": 1}, config=config)
    assert answer == {"count": 6}
    assert last_run(sdk, thread_id)["kwargs"]["config"]["tags"] == ["t"]


@row("runs", MAKES_A_RUN, "context")
def runs_with_its_context(sdk, method):
    how = {"input": {"topic": "tea"}, "context": {"voice": "loud"}}
    assert outcome(sdk, method, None, "teller", **how) == {"told": "loud tea"}


@row("runs", MAKES_A_RUN, "checkpoint", "checkpoint_id")
def continues_from_a_checkpoint(sdk, method):
    thread_id = counted(sdk, 1)
    then = sdk.threads.get_state(thread_id)
    sdk.runs.wait(thread_id, "counter", input={"count": 10})
    for where in ({"checkpoint": then["checkpoint"]}, {"checkpoint_id": then["checkpoint_id"]}):
        answer = outcome(sdk, method, thread_id, "counter", input={"note": "again"}, **where)
        assert answer == {"count": 3, "note": "again"}


@row("runs", MAKES_A_RUN, "durability")
def keeps_only_its_last_checkpoint(sdk, method):
    thread_id = new_thread(sdk)
    outcome(sdk, method, thread_id, "counter", input={"count": 1}, durability="exit")
    assert len(sdk.threads.get_history(thread_id)) == 1
    outcome(sdk, method, thread_id, "counter", input={"count": 1}, durability="sync")
    assert len(sdk.threads.get_history(thread_id)) == 4


@row("runs", MAKES_A_RUN, "checkpoint_during")
def keeps_no_checkpoint_during_the_run(sdk, method):
    thread_id = new_thread(sdk)
    with pytest.warns(DeprecationWarning, match="checkpoint_during"):
        how = {"input": {"count": 1}, "checkpoint_during": False}
        assert outcome(sdk, method, thread_id, "counter", **how) == {"count": 2}
    assert len(sdk.threads.get_history(thread_id)) == 1


@row("runs", MAKES_A_RUN, "interrupt_before", "interrupt_after")
def pauses_before_and_after_nodes(sdk, method):
    for where in ({"interrupt_before": ["s2"]}, {"interrupt_after": ["s1"]}):
        thread_id = new_thread(sdk)
        outcome(sdk, method, thread_id, "steps", input={}, **where)
        state = sdk.threads.get_state(thread_id)
        assert (state["values"]["steps"], state["next"]) == (["s1"], ["s2"])


@row("runs", MAKES_A_RUN, "multitask_strategy")
def is_refused_on_a_busy_thread(sdk, method):
    thread_id = running(sdk)["thread_id"]
    with refused(409):
        outcome(sdk, method, thread_id, "counter", input={}, multitask_strategy="reject")
    how = {"input": {"count": 1}, "multitask_strategy": "interrupt"}
    assert outcome(sdk, method, thread_id, "counter", **how)["count"] == 2
    assert [r["status"] for r in sdk.runs.list(thread_id)] == ["success", "interrupted"]


@row("runs", MAKES_A_RUN, "if_not_exists")
def creates_its_thread(sdk, method):
    thread_id, how = str(uuid.uuid4()), {"input": {"count": 1}}
    with refused(404):
        outcome(sdk, method, thread_id, "counter", **how, if_not_exists="reject")
    outcome(sdk, method, thread_id, "counter", **how, if_not_exists="create")
    assert sdk.threads.get(thread_id)["values"] == {"count": 2}


@row("runs", MAKES_A_RUN, "on_completion")
def keeps_its_thread_if_asked(sdk, method):
    for on_completion, left in (("delete", 0), ("keep", 1)):
        note = tag()["tag"]
        how = {"input": {"count": 1, "note": note}, "on_completion": on_completion}
        assert outcome(sdk, method, None, "counter", **how)["count"] == 2
        assert sdk.threads.count(values={"note": note}) == left


@row("runs", MAKES_A_RUN, "after_seconds")
def starts_later(sdk, method):
    thread_id, asked = new_thread(sdk), datetime.now(UTC)
    how = {"input": {"count": 1}, "after_seconds": 1}
    assert outcome(sdk, method, thread_id, "counter", **how) == {"count": 2}
    assert datetime.now(UTC) - asked >= timedelta(seconds=1)


@row("runs", MAKES_A_RUN, "langsmith_tracing")
def names_the_langsmith_project_of_the_run(sdk, method):
    thread_id = new_thread(sdk)
    how = {"input": {"count": 1}, "langsmith_tracing": {"project_name": "elsewhere"}}
    assert outcome(sdk, method, thread_id, "counter", **how) == {"count": 2}
    configurable = last_run(sdk, thread_id)["kwargs"]["config"]["configurable"]
    assert configurable["__langsmith_project__"] == "elsewhere"


@row("runs", MAKES_A_RUN, "on_run_created")
def reports_the_created_run(sdk, method):
    thread_id, told = new_thread(sdk), []
    how = {"input": {"count": 1}, "on_run_created": told.append}
    outcome(sdk, method, thread_id, "counter", **how)
    run = last_run(sdk, thread_id)
    assert told == [{"run_id": run["run_id"], "thread_id": thread_id}]


@row("runs", MAKES_A_RUN, "webhook")
def is_accepted_with_a_webhook(sdk, method):
    """Other tests check that the webhook is called."""
    answer = outcome(sdk, method, None, "counter", input={"count": 1}, webhook=WEBHOOK)
    assert answer == {"count": 2}


@row("runs", "wait stream", "on_disconnect")
def is_cancelled_when_its_client_disconnects(sdk, method):
    thread_id = new_thread(sdk)
    how = {"input": {"seconds": 30}, "on_disconnect": "cancel"}
    if method == "stream":
        stream = sdk.runs.stream(thread_id, "steps", **how)
        assert next(stream).event == "metadata"
        stream.close()
    else:
        # The client times out, and finds the run interrupted when it reconnects.
        with sdk.impatient() as impatient, pytest.warns(UserWarning, match="reconnect"):
            impatient.runs.wait(thread_id, "steps", **how)
    until_status(sdk, last_run(sdk, thread_id), "interrupted")


@row("runs", "wait", "raise_error")
def raises_the_error_of_the_graph_if_asked(sdk):
    answer = sdk.runs.wait(None, "bad", input={}, raise_error=False)
    assert answer["__error__"]["error"] == "ValueError"
    with pytest.raises(Exception, match="boom from bad node"):
        sdk.runs.wait(None, "bad", input={}, raise_error=True)


@row("runs", "stream", "stream_mode", "stream_subgraphs")
def streams_the_requested_modes(sdk):
    def events(**options):
        parts = list(sdk.runs.stream(None, "family", input={}, **options))[1:]
        return [part.event for part in parts]

    assert set(events(stream_mode="values")) == {"values"}
    assert set(events(stream_mode=["updates", "custom"])) == {"updates"}
    deep = set(events(stream_mode=["updates", "custom"], stream_subgraphs=True))
    assert {event.split("|")[0] for event in deep} == {"updates", "custom"}
    assert any(event.startswith("updates|child") for event in deep)


@row("runs", "create", "stream_mode", "stream_subgraphs", "stream_resumable")
@row("runs", "join_stream", "last_event_id", "stream_mode")
def can_be_joined_after_its_end(sdk):
    thread_id = new_thread(sdk)
    how = {"stream_mode": ["updates", "values"], "stream_subgraphs": True}
    run = sdk.runs.create(thread_id, "family", input={}, stream_resumable=True, **how)
    ids = thread_id, run["run_id"]
    sdk.runs.join(*ids)
    whole = list(sdk.runs.join_stream(*ids, last_event_id="-1"))
    assert {part.event.split("|")[0] for part in whole} == {"metadata", "updates", "values"}
    assert any(part.event.startswith("updates|child") for part in whole)
    assert list(sdk.runs.join_stream(*ids, last_event_id=whole[2].id)) == whole[3:]
    only = list(sdk.runs.join_stream(*ids, last_event_id="-1", stream_mode=["values"]))
    assert {part.event.split("|")[0] for part in only} - {"metadata"} == {"values"}


@row("runs", "stream", "stream_resumable")
def can_be_read_again_after_its_end(sdk):
    thread_id = new_thread(sdk)
    for resumable in (False, True):
        how = {"input": {"count": 1}, "stream_resumable": resumable}
        parts = list(sdk.runs.stream(thread_id, "counter", **how))
        assert all((part.id is not None) is resumable for part in parts)
    run_id = parts[0].data["run_id"]
    assert list(sdk.runs.join_stream(thread_id, run_id, last_event_id="-1")) == parts


@row("runs", "stream", "feedback_keys")
def keeps_its_feedback_keys(sdk):
    thread_id = new_thread(sdk)
    list(sdk.runs.stream(thread_id, "counter", input={}, feedback_keys=["liked"]))
    assert last_run(sdk, thread_id)["kwargs"]["feedback_keys"] == ["liked"]


@row("runs", "stream", "version")
def streams_in_the_requested_version(sdk):
    parts = list(sdk.runs.stream(None, "counter", input={"count": 1}, version="v2"))
    assert [(p["type"], p["ns"], p["data"]) for p in parts[1:]] == [
        ("values", [], {"count": 1}),
        ("values", [], {"count": 2}),
    ]
    first = next(sdk.runs.stream(None, "counter", input={"count": 1}, version="v1"))
    assert first.event == "metadata"


@row("runs", "create_batch")
def creates_a_batch(sdk):
    payloads = [{"assistant_id": "counter", "input": {"count": n}} for n in (1, 5)]
    made = sdk.runs.create_batch(payloads)
    answers = [sdk.runs.join(run["thread_id"], run["run_id"]) for run in made]
    assert answers == [{"count": 2}, {"count": 6}]


# --- existing runs ------------------------------------------------------------------------------


@row("runs", "list", "limit", "offset", "status", "select")
def is_listed(sdk):
    thread_id = counted(sdk, 1, 2, 3)
    sdk.runs.wait(thread_id, "bad", input={}, raise_error=False)
    whole = ids_of(sdk.runs.list(thread_id), "run")
    assert len(whole) == 4
    assert ids_of(sdk.runs.list(thread_id, limit=2), "run") == whole[:2]
    assert ids_of(sdk.runs.list(thread_id, offset=3), "run") == whole[3:]
    assert ids_of(sdk.runs.list(thread_id, status="error"), "run") == whole[:1]
    assert sdk.runs.list(thread_id, limit=1, select=["status"]) == [{"status": "error"}]


@row("runs", "get")
def is_found(sdk):
    run = last_run(sdk, counted(sdk, 1))
    assert sdk.runs.get(run["thread_id"], run["run_id"]) == run


@row("runs", "cancel", "wait", "action")
def is_cancelled(sdk):
    run = running(sdk)
    sdk.runs.cancel(run["thread_id"], run["run_id"], wait=True, action="interrupt")
    assert sdk.runs.get(run["thread_id"], run["run_id"])["status"] == "interrupted"
    run = running(sdk)
    sdk.runs.cancel(run["thread_id"], run["run_id"], wait=True, action="rollback")
    assert sdk.runs.list(run["thread_id"]) == []
    run = running(sdk)
    sdk.runs.cancel(run["thread_id"], run["run_id"], wait=False)
    until_status(sdk, run, "interrupted")


@row("runs", "cancel_many", "thread_id", "run_ids", "status", "action")
def is_cancelled_in_bulk(sdk):
    first, other = running(sdk), running(sdk)
    sdk.runs.cancel_many(thread_id=first["thread_id"], run_ids=[first["run_id"]], action="rollback")
    wait_until(lambda: sdk.runs.list(first["thread_id"]) == [], 20, "the rollback")
    assert sdk.runs.get(other["thread_id"], other["run_id"])["status"] == "running"
    sdk.runs.cancel_many(status="all", action="interrupt")
    until_status(sdk, other, "interrupted")


@row("runs", "join")
def is_joined(sdk):
    thread_id = new_thread(sdk)
    run = sdk.runs.create(thread_id, "counter", input={"count": 1})
    assert sdk.runs.join(thread_id, run["run_id"]) == {"count": 2}


@row("runs", "join_stream", "cancel_on_disconnect")
def is_cancelled_when_a_joined_client_disconnects(sdk):
    for cancel, status in ((False, "running"), (True, "interrupted")):
        thread_id = new_thread(sdk)
        how = {"input": {"seconds": 30}, "stream_resumable": True}
        run = sdk.runs.create(thread_id, "steps", **how)
        until_status(sdk, run, "running")
        joined = sdk.runs.join_stream(
            thread_id, run["run_id"], cancel_on_disconnect=cancel, last_event_id="-1"
        )
        assert next(joined).event == "metadata"
        joined.close()
        until_status(sdk, run, status)


@row("runs", "delete")
def is_deleted(sdk):
    run = running(sdk)
    sdk.runs.delete(run["thread_id"], run["run_id"])
    with pytest.raises(NotFoundError):
        sdk.runs.get(run["thread_id"], run["run_id"])


# --- crons ------------------------------------------------------------------------------------

#: Options that a cron passes on to its runs, with their values in its payload.
HANDED_ON = {
    "input": {"count": 1},
    "context": {"by": 4},
    "interrupt_before": ["inc"],
    "interrupt_after": ["inc"],
    "stream_mode": ["updates", "values"],
    "stream_subgraphs": True,
    "stream_resumable": True,
    "durability": "sync",
}


@contextmanager
def cron(sdk: Sdk, method: str, *args: Any, **options: Any) -> Iterator[dict[str, Any]]:
    """Yield a cron and delete it afterwards; `create_for_thread` creates it on a thread."""
    options = {"schedule": NEVER_SOON, **options}
    if method == "create_for_thread":
        made = sdk.crons.create_for_thread(new_thread(sdk), "counter", **options)
    else:
        made = sdk.crons.create("counter", **options)
    try:
        yield made
    finally:
        sdk.crons.delete(made["cron_id"])


MAKES_A_CRON = "create create_for_thread"


@row("crons", MAKES_A_CRON, "webhook")
@row("crons", "update", "webhook")
def is_accepted_with_a_webhook_for_its_runs(sdk, method="update"):
    how = {} if method == "update" else {"webhook": WEBHOOK}
    with cron(sdk, method, **how) as made:
        if method == "update":
            sdk.crons.update(made["cron_id"], enabled=False, webhook=WEBHOOK)


@row("crons", MAKES_A_CRON, *HANDED_ON, "metadata", "config", "multitask_strategy")
def passes_its_options_to_its_runs(sdk, method):
    mine = tag()
    how = {**HANDED_ON, "metadata": mine, "multitask_strategy": "interrupt"}
    with cron(sdk, method, **how) as made:
        assert made["payload"].items() >= {**HANDED_ON, "multitask_strategy": "interrupt"}.items()
        assert made["metadata"] == mine
    config = {"configurable": {"by": 3}, "tags": ["t"]}
    with cron(sdk, method, config=config) as made:
        assert made["payload"]["config"]["tags"] == ["t"]
        assert made["payload"]["config"]["configurable"]["by"] == 3


@row("crons", MAKES_A_CRON, "end_time", "enabled", "timezone")
def is_scheduled_with_end_time_and_timezone(sdk, method):
    end = datetime.now(UTC) + timedelta(days=800)
    how = {"end_time": end, "enabled": False, "timezone": "Europe/Berlin"}
    with cron(sdk, method, **how) as made:
        assert datetime.fromisoformat(made["end_time"]) == end
        assert (made["enabled"], made["timezone"]) == (False, "Europe/Berlin")
        first = datetime.fromisoformat(made["next_run_date"]).astimezone(UTC)
        assert (first.month, first.day, first.hour) == (12, 31, 23)


@row("crons", MAKES_A_CRON, "checkpoint_during")
def keeps_no_checkpoints_during_its_runs(sdk, method):
    with pytest.warns(DeprecationWarning, match="checkpoint_during"):
        with cron(sdk, method, checkpoint_during=False) as made:
            assert made["payload"]["checkpoint_during"] is False


@row("crons", "create", "on_run_completed", "input", "context")
def fires_and_keeps_the_threads_of_its_runs(sdk):
    note = tag()["tag"]
    how = {"input": {"count": 1, "note": note}, "context": {"by": 4}}
    with cron(sdk, "create", schedule=EVERY_SECOND, on_run_completed="keep", **how):
        values = {"count": 5, "note": note}
        wait_until(lambda: sdk.threads.count(values=values), 20, "a run of the cron")


@row("crons", "create_for_thread", "input", "metadata")
def fires_on_its_thread(sdk):
    mine = tag()
    how = {"input": {"count": 1}, "metadata": mine}
    with cron(sdk, "create_for_thread", schedule=EVERY_SECOND, **how) as made:
        runs = wait_until(lambda: sdk.runs.list(made["thread_id"]), 20, "a run of the cron")
        assert runs[-1]["metadata"].items() >= mine.items()
        assert sdk.runs.join(made["thread_id"], runs[-1]["run_id"]) == {"count": 2}


@row("crons", "delete")
def is_not_counted_after_its_deletion(sdk):
    with cron(sdk, "create") as other:
        made = sdk.crons.create("counter", schedule=NEVER_SOON, metadata=tag())
        sdk.crons.delete(made["cron_id"])
        assert sdk.crons.count(metadata=made["metadata"]) == 0
        with pytest.raises(NotFoundError):
            sdk.crons.delete(made["cron_id"])
        assert other["cron_id"] != made["cron_id"]


@row(
    *("crons", "update", *HANDED_ON, "schedule", "end_time", "metadata", "config"),
    *("on_run_completed", "enabled", "timezone"),
)
def is_updated(sdk):
    end = datetime.now(UTC) + timedelta(days=800)
    with cron(sdk, "create", metadata={"a": 1}) as made:
        changed = sdk.crons.update(
            made["cron_id"],
            schedule="30 12 1 7 *",
            timezone="Europe/Berlin",
            end_time=end,
            enabled=False,
            on_run_completed="keep",
            metadata={"b": 2},
            **HANDED_ON,
        )
        assert changed["payload"].items() >= HANDED_ON.items()
        assert changed["metadata"] == {"a": 1, "b": 2}
        assert (changed["enabled"], changed["on_run_completed"]) == (False, "keep")
        assert datetime.fromisoformat(changed["end_time"]) == end
        first = datetime.fromisoformat(changed["next_run_date"]).astimezone(UTC)
        assert (first.month, first.hour, first.minute) == (7, 10, 30)
        assert sdk.crons.update(made["cron_id"], end_time=None)["end_time"] is None
    with cron(sdk, "create") as made:
        changed = sdk.crons.update(made["cron_id"], config={"tags": ["t"]})
        assert changed["payload"]["config"]["tags"] == ["t"]


@row(
    *("crons", "search", "assistant_id", "thread_id", "enabled", "metadata", "limit", "offset"),
    *("sort_by", "sort_order", "select"),
)
@row("crons", "count", "assistant_id", "thread_id", "metadata")
def is_searched_and_counted(sdk):
    mine = tag()
    assistant_id = sdk.assistants.create("counter")["assistant_id"]
    third = sdk.crons.create(assistant_id, schedule=NEVER_SOON, metadata=mine)["cron_id"]
    with (
        cron(sdk, "create", metadata=mine, enabled=False) as one,
        cron(sdk, "create_for_thread", metadata=mine) as two,
    ):
        ids = [third, one["cron_id"], two["cron_id"]]
        for which, wanted in (
            ({}, ids),
            ({"assistant_id": assistant_id}, ids[:1]),
            ({"thread_id": two["thread_id"]}, ids[2:]),
        ):
            order = {"sort_by": "created_at", "sort_order": "asc"}
            assert ids_of(sdk.crons.search(metadata=mine, **which, **order), "cron") == wanted
            assert sdk.crons.count(metadata=mine, **which) == len(wanted)
        assert ids_of(sdk.crons.search(metadata=mine, enabled=False), "cron") == ids[1:2]
        page = {"limit": 1, "offset": 1, "sort_by": "created_at", "sort_order": "desc"}
        assert ids_of(sdk.crons.search(metadata=mine, **page), "cron") == ids[1:2]
        chosen = sdk.crons.search(metadata=mine, enabled=False, select=["enabled"])
        assert chosen == [{"enabled": False}]
    sdk.assistants.delete(assistant_id)


# --- the store --------------------------------------------------------------------------------


def new_root() -> str:
    return uuid.uuid4().hex


def keys(found: dict[str, Any]) -> list[str]:
    return [item["key"] for item in found["items"]]


@row("store", "put_item", "index")
@row("store", "search_items", "query")
def is_found_by_meaning_where_it_is_indexed(sdk):
    root = new_root()
    sdk.store.put_item([root], "seen", {"text": "green tea"})
    sdk.store.put_item([root], "hidden", {"text": "green tea"}, index=False)
    sdk.store.put_item([root], "other", {"note": "green tea"}, index=["note"])
    found = sdk.store.search_items([root], query="green tea")["items"]
    scores = {item["key"]: item["score"] for item in found}
    assert scores["seen"] == pytest.approx(1)
    assert scores["other"] == pytest.approx(1)
    assert scores.get("hidden") is None


@row("store", "put_item", "ttl")
@row("store", "get_item", "refresh_ttl")
@row("store", "search_items", "refresh_ttl")
def expires_unless_it_is_read(sdk):
    root = new_root()
    for key in ("left", "read", "searched"):
        sdk.store.put_item([root, key], key, {"a": 1}, ttl=2 / 60)

    def is_left():
        sdk.store.get_item([root, "read"], "read", refresh_ttl=True)
        sdk.store.search_items([root, "searched"], refresh_ttl=True)
        found = sdk.store.get_item([root, "left"], "left", refresh_ttl=False)
        return found is not None or keys(sdk.store.search_items([root, "left"], refresh_ttl=False))

    wait_until(lambda: not is_left(), 20, "the expiry of what nobody refreshes")
    assert keys(sdk.store.search_items([root])) in (["read", "searched"], ["searched", "read"])


@row("store", "get_item")
@row("store", "delete_item")
def is_read_until_it_is_deleted(sdk):
    root = new_root()
    sdk.store.put_item([root, "a"], "k", {"n": 1})
    item = sdk.store.get_item([root, "a"], "k")
    assert (item["namespace"], item["key"], item["value"]) == ([root, "a"], "k", {"n": 1})
    sdk.store.delete_item([root, "a"], "k")
    assert sdk.store.get_item([root, "a"], "k") is None


@row("store", "search_items", "filter", "limit", "offset")
def is_found_by_its_value(sdk):
    root = new_root()
    for n in range(3):
        sdk.store.put_item([root], str(n), {"n": n})
    whole = keys(sdk.store.search_items([root]))
    assert sorted(whole) == ["0", "1", "2"]
    assert keys(sdk.store.search_items([root], filter={"n": 1})) == ["1"]
    assert sorted(keys(sdk.store.search_items([root], filter={"n": {"$gte": 1}}))) == ["1", "2"]
    assert keys(sdk.store.search_items([root], limit=2)) == whole[:2]
    assert keys(sdk.store.search_items([root], offset=2)) == whole[2:]


@row("store", "list_namespaces", "prefix", "suffix", "max_depth", "limit", "offset")
def has_its_namespaces_listed(sdk):
    root = new_root()
    paths = [[root, "a", "x"], [root, "a", "y"], [root, "b", "x"]]
    for path in paths:
        sdk.store.put_item(path, "k", {"n": 1})

    def listed(**which):
        return sdk.store.list_namespaces(**{"prefix": [root], **which})["namespaces"]

    assert listed() == paths
    assert listed(prefix=[root, "a"]) == paths[:2]
    assert listed(suffix=["x"]) == [paths[0], paths[2]]
    assert listed(max_depth=2) == [[root, "a"], [root, "b"]]
    assert listed(limit=1, offset=1) == paths[1:2]
