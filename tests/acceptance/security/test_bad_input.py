"""Invalid input is rejected before anything is created; unusual input is stored unchanged.

Every rejection is a 4xx whose body is `{"detail": "<string>"}` and nothing else. `BODIES` lists the
fields of every body. A test compares it with the OpenAPI document, so that no new field is left
out.
"""

from __future__ import annotations

import gzip
import json
import socket
import threading
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import httpx
import pytest
from _pytest.mark import ParameterSet

from tests.acceptance.playing import new_thread, refused
from tests.conformance import watched
from tests.long_forms import long_case

UNKNOWN = "018f0000-0000-7000-8000-00000000dead"
RUN = {"assistant_id": "counter", "input": {"count": 1}}
CRON = {"assistant_id": "counter", "schedule": "0 0 1 1 *"}
LATER = {**RUN, "after_seconds": 3600}


def refusal(response: httpx.Response, *statuses: int) -> str | None:
    """Return None for a rejection with one of the statuses (default 422), else a description."""
    expected = statuses or (422,)
    shown = f"{response.status_code} {response.text[:100]}"
    if response.status_code not in expected:
        return f"{shown} instead of {expected}"
    if response.headers.get("content-type") != "application/json":
        return f"content-type {response.headers.get('content-type')}: {shown}"
    body = response.json()
    if list(body) != ["detail"] or not isinstance(body["detail"], str) or not body["detail"]:
        return f"not a detail: {shown}"
    return None


def assert_none(problems: dict[str, str | None]) -> None:
    wrong = [f"{request}: {problem}" for request, problem in problems.items() if problem]
    assert not wrong, "\n".join(["", *wrong])


def assert_refused(response: httpx.Response, *statuses: int) -> str:
    assert refusal(response, *statuses) is None
    return response.json()["detail"]


@dataclass(frozen=True)
class Spot:
    """An idle thread with a run that has ended and a checkpoint."""

    thread_id: str
    run_id: str
    checkpoint_id: str
    assistant_id: str = UNKNOWN
    cron_id: str = UNKNOWN

    def url(self, template: str) -> str:
        return template.format(
            thread_id=self.thread_id,
            run_id=self.run_id,
            checkpoint_id=self.checkpoint_id,
            assistant_id=self.assistant_id,
            namespace="child",
            cron_id=self.cron_id,
        )

    def body(self, template: Any) -> Any:
        """Fill in the ids in a body, such as "{thread_id}"."""
        if isinstance(template, dict):
            return {key: self.body(value) for key, value in template.items()}
        if isinstance(template, list):
            return [self.body(item) for item in template]
        return self.url(template) if isinstance(template, str) and "{" in template else template


def new_spot(http, graph: str = "counter", graph_input: Any = None) -> Spot:
    thread_id = http.post("/threads", json={}).json()["thread_id"]
    body = {"assistant_id": graph, "input": {"count": 1} if graph_input is None else graph_input}
    run = http.post(f"/threads/{thread_id}/runs", json=body).json()
    http.get(f"/threads/{thread_id}/runs/{run['run_id']}/join")
    state = http.get(f"/threads/{thread_id}/state").json()
    cron = http.post("/runs/crons", json=CRON).json()
    return Spot(thread_id, run["run_id"], state["checkpoint_id"], cron_id=cron["cron_id"])


@pytest.fixture(scope="module")
def http(server):
    """Yield one client for all tests; creating one takes longer than most of these requests."""
    with watched(httpx.Client(base_url=server.url, timeout=60)) as client:
        yield client


@pytest.fixture(scope="module")
def _kept_spot():
    return []


@pytest.fixture
def spot(http, _kept_spot):
    """Return a shared thread, or a new one if a run that should be rejected was created on it."""
    if _kept_spot:
        runs = http.get(f"/threads/{_kept_spot[0].thread_id}/runs").json()
        if [run["run_id"] for run in runs] != [_kept_spot[0].run_id]:
            _kept_spot.clear()
    if not _kept_spot:
        _kept_spot.append(new_spot(http))
    return _kept_spot[0]


def _counts(http) -> dict[str, int]:
    return {kind: http.post(f"/{kind}/count", json={}).json() for kind in ("threads", "assistants")}


def _traces(http, spot: Spot) -> dict[str, Any]:
    """Return all of a thread that a rejected request could have changed."""
    thread = http.get(f"/threads/{spot.thread_id}").json()
    state = http.get(f"/threads/{spot.thread_id}/state").json()
    runs = http.get(f"/threads/{spot.thread_id}/runs", params={"select": ["run_id", "status"]})
    kept = ("metadata", "config", "values", "status")
    return {
        **{key: thread[key] for key in kept},
        "state": (state["values"], state["checkpoint_id"]),
        "runs": runs.json(),
    }


@contextmanager
def leaving_no_trace(http, spot: Spot) -> Iterator[dict[str, str]]:
    """Yield a dict for problems; check that it is empty and that nothing was created or changed."""
    problems: dict[str, str] = {}
    counts, before = _counts(http), _traces(http, spot)
    yield problems
    assert_none(problems)
    assert (_counts(http), _traces(http, spot)) == (counts, before)


# ---------------------------------------------------------------------------------------------
# The fields of every body, and the values that each must reject.


@dataclass(frozen=True)
class Kind:
    """JSON values that a field must reject."""

    wrong: tuple[Any, ...]
    nullable: bool = True

    @property
    def refused(self) -> list[Any]:
        return [*self.wrong, *([] if self.nullable else [None])]

    @property
    def required(self) -> Kind:
        return replace(self, nullable=False)


def enum(*choices: str) -> Kind:
    wrong = ("bad", "", choices[0].upper(), f" {choices[0]}", f"{choices[0]}\n")
    return Kind((*wrong, *STRING.wrong))


def integer(low: int, high: int) -> Kind:
    out_of_range = (low - 1, high + 1, 2**31 + 1, 2**63, 2**64, 10**30, -(10**30))
    return Kind(("5", "", True, 1.5, 1e300, [], [1], {}, *out_of_range))


#: Texts that are not UUIDs. The last ones are accepted by `int(text, 16)`, and so by Python's UUID.
NO_UUID = (
    *("", "x", "nil", "1", "../../etc/passwd", "'; DROP TABLE thread;--", "None"),
    *(f"{UNKNOWN}0", UNKNOWN[:-1], UNKNOWN.replace("-", "g"), UNKNOWN.replace("d", "z")),
    "0x" + "1" * 30,
    "+" + "1" * 31,
    "1" * 15 + "_" + "1" * 16,
    "\N{FULLWIDTH DIGIT ONE}" * 32,
    " " + "1" * 30 + "\n",
)

ANY = Kind(())
STRING = Kind((True, 7, 1.5, [], ["x"], {}, {"a": "x"}))
UUID = Kind((*NO_UUID, True, 7, 1.5, [], [UNKNOWN], {}))
OBJECT = Kind(("", "x", True, 7, 1.5, [], [1], [["a", 1]]))
BOOLEAN = Kind(("true", "", "x", 0, 1, 1.5, [], {}))
STRINGS = Kind((True, 7, 1.5, {}, {"a": "x"}, [7], ["a", None], [["a"]], [{}]))
STRING_LIST = Kind((*STRINGS.wrong, "x"))
UUIDS = Kind(("x", UNKNOWN, 7, True, {}, ["x"], [7], [None], [UNKNOWN, "x"], [UNKNOWN] * 10_001))
WEBHOOK = Kind((*STRING.wrong, "", "notaurl", "http://127.0.0.1/", "file:///etc/passwd"))
LABELS = Kind(("x", True, 7, {}, [7], [None], ["a.b"], [""], [[]], ["a"] * 101))
LIMIT = integer(1, 1000).required
OFFSET = integer(0, 2**31).required
AFTER = Kind(("5", "", True, [], {}, 1e300, 10**30, 2**63, 1e12))
TIMEOUT = Kind((*AFTER.wrong, 0, -1, -0.0, -1e300))
STREAM_MODE = Kind(
    (
        *STRINGS.wrong,
        *("", "bad", "VALUES", "values,updates", ["values", "bad"], [""]),
        *("tools", "lifecycle", "EVENTS", "tasks,debug", ["values", "tools"], ["lifecycle"]),
    )
)
GOTO = Kind((True, 7, 1.5, {}, {"node": 5}, {"input": 1}, [7], [["x"]], [{}], [{"node": None}]))
UPDATE = Kind((True, 7, 1.5, "", "x", [1], ["ab"], [["a"]], [["a", 1, 2]], [[1, "a"]], [{}]))
SUPERSTEPS = Kind(
    (
        *("x", True, 7, {}, [7], [[]], [{}], [{"updates": []}], [{"updates": 5}]),
        *([{"updates": [5]}], [{"updates": [{"as_node": 5}]}], [{"updates": [{"command": 5}]}]),
    )
)
EXTRACT = Kind(
    (
        *("x", True, 7, [], ["values"], {"a": 5}, {"a": None}, {"a": ["values"]}),
        *({"a": ""}, {"a": "nope"}, {"a": "values."}, {"a": "values[x]"}, {"a": "valuesx"}),
        {str(n): "values" for n in range(11)},
    )
)
BEFORE = Kind(
    (
        *("", "bad", True, 7, 1.5, [], [UNKNOWN]),
        *({"checkpoint_id": "bad"}, {"checkpoint_id": 5}, {"configurable": 5}),
        *({"configurable": {"checkpoint_id": "bad"}}, {"configurable": {"checkpoint_id": [1]}}),
    )
)
STATUS = enum("idle", "busy", "interrupted", "error")

CHECKPOINT = {
    "checkpoint": Kind(OBJECT.wrong),
    "checkpoint.thread_id": STRING,
    "checkpoint.checkpoint_ns": STRING,
    "checkpoint.checkpoint_id": UUID,
    "checkpoint.checkpoint_map": Kind((*OBJECT.wrong, {"": 5}, {"": ["x"]}, {"": {}})),
}
CONFIG = {
    "config": OBJECT,
    "config.tags": STRING_LIST,
    "config.recursion_limit": integer(1, 1_000_000),
    "config.max_concurrency": integer(1, 10_000),
    "config.configurable": OBJECT,
    "config.metadata": OBJECT,
    "config.run_name": STRING,
}
TTL = {
    "ttl": OBJECT,
    "ttl.ttl": Kind(("5", "", True, [], {}, 0, -1, 1e300, 10**30)).required,
    "ttl.strategy": Kind(enum("delete", "keep_latest").wrong).required,
}
SELECT = {"select": Kind(("values", 7, True, {}, ["nope"], ["values."], [7], [None])).required}
SEARCH = {
    "metadata": OBJECT,
    "limit": LIMIT,
    "offset": OFFSET,
    "sort_order": enum("asc", "desc"),
    "select": Kind((*STRINGS.wrong, "nope", ["nope"], ["metadata", "1; SELECT 1"], "")),
}
RUN_FIELDS = {
    "assistant_id": Kind((*STRING.wrong, "nope", "", "COUNTER")).required,
    "run_id": UUID.required,
    "input": ANY,
    "command": OBJECT,
    "command.update": UPDATE,
    "command.resume": ANY,
    "command.goto": GOTO,
    **CONFIG,
    "config.configurable.checkpoint_id": UUID,
    "context": OBJECT,
    "metadata": OBJECT,
    **CHECKPOINT,
    "checkpoint_id": UUID,
    "interrupt_before": STRINGS,
    "interrupt_after": STRINGS,
    "stream_mode": STREAM_MODE,
    "stream_subgraphs": BOOLEAN,
    "stream_resumable": BOOLEAN,
    "multitask_strategy": enum("reject", "interrupt", "rollback", "enqueue").required,
    "after_seconds": AFTER,
    "timeout_seconds": TIMEOUT,
    "durability": enum("sync", "async", "exit"),
    "checkpoint_during": BOOLEAN,
    "strict_resume": BOOLEAN,
    "webhook": WEBHOOK,
    "feedback_keys": STRING_LIST,
    "langsmith_tracer": OBJECT,
    "langsmith_tracer.project_name": STRING,
    "langsmith_tracer.example_id": STRING,
    "on_disconnect": enum("cancel", "continue"),
}
THREAD_RUN = {**RUN_FIELDS, "if_not_exists": enum("create", "reject").required}
STATELESS_RUN = {**RUN_FIELDS, "on_completion": enum("delete", "keep").required}

CRON_FIELDS = {
    "assistant_id": STRING.required,
    "schedule": Kind((*STRING.wrong, "", "bad", "* * * *", "0 0 31 2 *", "x" * 201)).required,
    "timezone": Kind((*STRING.wrong, "", "Bad/Zone", "../../etc/passwd", "x" * 101)),
    "end_time": Kind((*STRING.wrong, "", "bad", "2020-01-01T00:00:00Z", "2020-13-01")),
    "enabled": BOOLEAN,
    "input": ANY,
    "metadata": OBJECT,
    **CONFIG,
    "context": OBJECT,
    "interrupt_before": STRINGS,
    "interrupt_after": STRINGS,
    "on_run_completed": enum("delete", "keep"),
    "stream_mode": STREAM_MODE,
    "stream_subgraphs": BOOLEAN,
    "stream_resumable": BOOLEAN,
    "durability": enum("sync", "async", "exit"),
    "webhook": WEBHOOK,
    "checkpoint_during": BOOLEAN,
    "multitask_strategy": enum("reject", "interrupt", "rollback", "enqueue"),
}
CRON_FILTER = {
    "assistant_id": STRING,
    "thread_id": Kind(UUID.wrong),
    "enabled": BOOLEAN,
    "metadata": OBJECT,
}

#: Path of a POST or PATCH, a valid body, and its fields by dotted name.
BODIES: dict[str, tuple[dict[str, Any], dict[str, Kind]]] = {
    "POST /assistants": (
        {"graph_id": "counter"},
        {
            "graph_id": STRING.required,
            "assistant_id": UUID.required,
            "name": STRING,
            "description": STRING,
            **CONFIG,
            "context": OBJECT,
            "metadata": OBJECT,
            "if_exists": enum("raise", "do_nothing").required,
        },
    ),
    "POST /assistants/search": (
        {},
        {
            **SEARCH,
            "graph_id": STRING,
            "name": STRING,
            "sort_by": enum("assistant_id", "created_at", "updated_at", "name", "graph_id"),
        },
    ),
    "POST /assistants/count": ({}, {"metadata": OBJECT, "graph_id": STRING, "name": STRING}),
    "PATCH /assistants/{assistant_id}": (
        {},
        {
            "graph_id": STRING,
            "name": STRING,
            "description": STRING,
            **CONFIG,
            "context": OBJECT,
            "metadata": OBJECT,
        },
    ),
    "POST /assistants/{assistant_id}/versions": (
        {},
        {"metadata": OBJECT, "limit": LIMIT, "offset": OFFSET},
    ),
    "POST /assistants/{assistant_id}/latest": (
        {"version": 1},
        {"version": integer(1, 2**31 - 1).required},
    ),
    "POST /threads": (
        {},
        {
            "thread_id": UUID.required,
            "metadata": OBJECT,
            "if_exists": enum("raise", "do_nothing").required,
            "graph_id": STRING,
            **TTL,
            "supersteps": SUPERSTEPS,
        },
    ),
    "PATCH /threads/{thread_id}": ({}, {"metadata": OBJECT, **TTL}),
    "POST /threads/count": ({}, {"metadata": OBJECT, "values": OBJECT, "status": STATUS}),
    "POST /threads/prune": (
        {"thread_ids": []},
        {
            "thread_ids": UUIDS.required,
            "strategy": enum("delete", "keep_latest").required,
        },
    ),
    "POST /threads/search": (
        {},
        {
            **SEARCH,
            "ids": Kind(UUIDS.wrong),
            "values": OBJECT,
            "status": STATUS,
            "extract": EXTRACT,
            "sort_by": enum("thread_id", "created_at", "updated_at", "status"),
        },
    ),
    "POST /threads/{thread_id}/state/checkpoint": (
        {"checkpoint": {}},
        {
            **CHECKPOINT,
            "checkpoint": CHECKPOINT["checkpoint"].required,
            "subgraphs": BOOLEAN,
            **SELECT,
        },
    ),
    "POST /threads/{thread_id}/state": (
        {"values": {"count": 1}},
        {"values": ANY, "as_node": STRING, **CHECKPOINT, "checkpoint_id": UUID},
    ),
    "PATCH /threads/{thread_id}/state": ({}, {"metadata": OBJECT}),
    "POST /threads/{thread_id}/history": (
        {},
        {"limit": LIMIT, "before": BEFORE, "metadata": OBJECT, **CHECKPOINT, **SELECT},
    ),
    "POST /runs/crons": (CRON, CRON_FIELDS),
    "POST /threads/{thread_id}/runs/crons": (CRON, CRON_FIELDS),
    "PATCH /runs/crons/{cron_id}": (
        {"enabled": False},
        {
            name: kind
            for name, kind in CRON_FIELDS.items()
            if name not in ("assistant_id", "checkpoint_during", "multitask_strategy")
        },
    ),
    "POST /runs/crons/count": ({}, CRON_FILTER),
    "POST /runs/crons/search": (
        {},
        {
            **CRON_FILTER,
            **SEARCH,
            "sort_by": enum("cron_id", "created_at", "next_run_date"),
        },
    ),
    "PUT /store/items": (
        {"namespace": ["a"], "key": "k", "value": {}},
        {
            "namespace": LABELS.required,
            "key": STRING.required,
            "value": OBJECT.required,
            "index": Kind(("x", True, 7, {}, [7], [None])),
            "ttl": TIMEOUT,
        },
    ),
    "DELETE /store/items": (
        {"namespace": ["a"], "key": "k"},
        {"namespace": LABELS.required, "key": STRING.required},
    ),
    "POST /store/items/search": (
        {},
        {
            "namespace_prefix": LABELS,
            "filter": OBJECT,
            "query": STRING,
            "limit": LIMIT,
            "offset": OFFSET,
            "refresh_ttl": BOOLEAN,
        },
    ),
    "POST /store/namespaces": (
        {},
        {
            "prefix": LABELS,
            "suffix": LABELS,
            "max_depth": integer(1, 100),
            "limit": LIMIT,
            "offset": OFFSET,
        },
    ),
    "POST /threads/{thread_id}/runs": (RUN, THREAD_RUN),
    "POST /threads/{thread_id}/runs/wait": (RUN, THREAD_RUN),
    "POST /threads/{thread_id}/runs/stream": (RUN, THREAD_RUN),
    "POST /runs": (RUN, STATELESS_RUN),
    "POST /runs/wait": (RUN, STATELESS_RUN),
    "POST /runs/stream": (RUN, STATELESS_RUN),
    "POST /runs/cancel": (
        {"thread_id": "{thread_id}", "run_ids": ["{run_id}"]},
        {
            "status": enum("pending", "running", "all", "success").required,
            "thread_id": UUID.required,
            "run_ids": UUIDS.required,
        },
    ),
}
#: The statuses of the responses, where not 200.
ANSWERS = {
    "PATCH /threads/{thread_id}/state": 204,
    "POST /runs/cancel": 404,  # the run has ended: there is nothing to cancel
    "PUT /store/items": 204,
    "DELETE /store/items": 204,
}
CREATES_A_RUN = [name for name, (base, _) in BODIES.items() if base is RUN]


def send(http, spot: Spot, operation: str, **how: Any) -> httpx.Response:
    method, path = operation.split(" ", 1)
    return http.request(method, spot.url(path), **how)


def changed(base: dict[str, Any], dotted: str, value: Any) -> dict[str, Any]:
    """Return the body with one field set."""
    first, _, rest = dotted.partition(".")
    inner = changed(base.get(first) or {}, rest, value) if rest else value
    return {**base, first: inner}


def without(base: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in base.items() if key != name}


def _body_schemas(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    found = {}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            content = (
                operation.get("requestBody", {}).get("content") if method != "parameters" else None
            )
            if content:
                found[f"{method.upper()} {path}"] = content["application/json"]["schema"]
    return found


def _dotted_fields(document: dict[str, Any], schema: dict[str, Any], prefix: str = "") -> set[str]:
    """Return the names of all fields, including those of nested objects with their own schema."""
    references = [schema, *schema.get("anyOf", []), *schema.get("allOf", [])]
    fields: set[str] = set()
    for item in references:
        named = item.get("$ref", "").rpartition("/")[2]
        resolved = document["components"]["schemas"][named] if named else item
        for name, field in resolved.get("properties", {}).items():
            fields |= {prefix + name, *_dotted_fields(document, field, f"{prefix}{name}.")}
    return fields


def test_the_table_has_every_body_and_every_field_of_the_document(http):
    document = http.get("/openapi.json").json()
    schemas = _body_schemas(document)
    # A list of bodies of `POST /runs`; test_batch_runs has the values that it must reject.
    del schemas["POST /runs/batch"]
    # Rejected in the format of the streaming protocol; test_protocol tests these.
    del schemas["POST /threads/{thread_id}/commands"]
    del schemas["POST /threads/{thread_id}/stream/events"]
    # Rejected in Exa's error format; test_agent_runs tests this body.
    del schemas["POST /agent/runs"]
    assert schemas.keys() == BODIES.keys()
    for operation, schema in schemas.items():
        fields = _dotted_fields(document, schema)
        assert fields - BODIES[operation][1].keys() == set(), operation


def test_every_base_body_of_the_table_is_accepted(http):
    """If a base body were invalid, the rejections below would prove nothing."""
    for operation, (base, _) in BODIES.items():
        assistant = http.post("/assistants", json={"graph_id": "counter"}).json()
        spot = replace(new_spot(http), assistant_id=assistant["assistant_id"])
        answer = send(http, spot, operation, json=spot.body(base))
        assert answer.status_code == ANSWERS.get(operation, 200), operation


#: In `make test` one operation gets every wrong value and the others a few, which shows that they
#: use the same checks; in `make test-all` each of them gets every one.
_THOROUGHLY = "POST /threads/{thread_id}/runs"


def each(operations: Iterable[str], *, thorough: str) -> list[ParameterSet]:
    """Return the operations, each with whether it gets every wrong value."""
    quick = [pytest.param(operation, operation == thorough) for operation in operations]
    further = [operation for operation in operations if operation != thorough]
    return quick + [long_case(operation, True) for operation in further]


def first_and_last(values: Sequence[Any], *, every: bool) -> Sequence[Any]:
    """Return the first two values and the last two, or every one."""
    return values if every or len(values) <= 4 else [*values[:2], *values[-2:]]


@pytest.mark.parametrize(("operation", "every"), each(BODIES, thorough=_THOROUGHLY))
def test_a_field_of_the_wrong_type_or_out_of_range_is_refused(http, spot, operation, every):
    base, fields = BODIES[operation]
    with leaving_no_trace(http, spot) as problems:
        for name, kind in fields.items():
            # For assistants an unknown graph name is 404, as in the reference.
            for value in first_and_last(kind.refused, every=every):
                answer = send(http, spot, operation, json=changed(spot.body(base), name, value))
                unknown_graph = name == "graph_id" and isinstance(value, str)
                if problem := refusal(answer, 404 if unknown_graph else 422):
                    problems[f"{name}={value!r}"[:80]] = problem


REQUIRED = [
    ("POST /assistants", "graph_id"),
    ("POST /threads/{thread_id}/state/checkpoint", "checkpoint"),
    *((operation, "assistant_id") for operation in CREATES_A_RUN),
    ("POST /runs/cancel", "thread_id"),
    ("POST /runs/cancel", "run_ids"),
]


def test_a_required_field_that_is_missing_is_refused(http, spot):
    with leaving_no_trace(http, spot):
        for operation, name in REQUIRED:
            body = without(spot.body(BODIES[operation][0]), name)
            detail = assert_refused(send(http, spot, operation, json=body))
            assert name in detail, operation


# ---------------------------------------------------------------------------------------------
# Bodies that are not JSON, or JSON that cannot be stored.


def nested(levels: int, inner: bytes = b"") -> bytes:
    return b"[" * levels + inner + b"]" * levels


#: Values of a key in an otherwise valid body.
NO_VALUES = {
    "NaN": b"NaN",
    "Infinity": b"Infinity",
    "minus Infinity": b"-Infinity",
    "1e400": b"1e400",
    "minus 1e400": b"-1e400",
    "5000 digits": b"9" * 5000,
    "a lone high surrogate": rb'"\ud800"',
    "a lone low surrogate": rb'"\udc00"',
    "surrogates in the wrong order": rb'"\udc00\ud800"',
    "a surrogate in a key": rb'{"\ud800": 1}',
    "a surrogate in UTF-8": b'"\xed\xa0\x80"',
    "a byte that is not UTF-8": b'"\xff"',
    "an overlong NUL": b'"\xc0\x80"',
    "a cut sequence": b'"\xe2\x82"',
    "a raw NUL": b'"a\x00b"',
    "a raw line break": b'"a\nb"',
    "an escaped NUL": rb'"a\u0000b"',
    "an escaped NUL in a key": rb'{"a\u0000": 1}',
    "an escaped NUL far inside": rb'[[{"a": {"b": [1, "\u0000"]}}]]',
    "an escaped NUL after a backslash": rb'"\\\u0000"',
    "single quotes": b"'x'",
    "a bare word": b"undefined",
    "a comment": b"1 /* one */",
    "a trailing comma": b"[1,]",
    "a leading zero": b"01",
    "hexadecimal": b"0x10",
    "101 levels": nested(100),
    "101 levels of objects": b'{"a":' * 100 + b"1" + b"}" * 100,
    "20000 levels": nested(20_000),
    "100000 levels": nested(100_000),
    "20000 levels that never end": b"[" * 20_000,
    "20000 levels of objects that never end": b'{"a":' * 20_000,
}
NO_BODIES = {
    "nothing": b"",
    "a blank": b" ",
    "a brace": b"{",
    "a NUL": b"\x00",
    "two documents": b"{}{}",
    "a tail": b"{}x",
    "a byte order mark": b"\xef\xbb\xbf{}",
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "a form": b"assistant_id=counter",
    "gzip": gzip.compress(b"{}"),
}
NOT_OBJECTS = [b"null", b"true", b"0", b'"x"', b"[]", b"[{}]", b'"' + b"x" * 10_000 + b'"']


def with_value(base: dict[str, Any], value: bytes, key: str) -> bytes:
    """Return the body as JSON, with a value that json.dumps would not write."""
    start = json.dumps(without(base, key)).encode()[:-1]
    return (
        start + (b"," if len(start) > 1 else b"") + json.dumps(key).encode() + b":" + value + b"}"
    )


@pytest.mark.parametrize(("operation", "every"), each(BODIES, thorough=_THOROUGHLY))
def test_a_body_that_is_not_json_is_refused(http, spot, operation, every):
    base = spot.body(BODIES[operation][0])
    no_values = [(name, with_value(base, value, "x")) for name, value in NO_VALUES.items()]
    bodies = [*NO_BODIES.items(), *no_values]
    with leaving_no_trace(http, spot) as problems:
        for name, content in first_and_last(bodies, every=every):
            answer = send(http, spot, operation, content=content)
            problem = refusal(answer)
            if problem or not answer.json()["detail"].startswith("Invalid JSON in request body"):
                problems[name] = problem or answer.text


@pytest.mark.parametrize("key", ["input", "metadata", "config", "context", "command"])
def test_a_run_with_data_that_cannot_be_stored_is_refused(http, spot, key):
    with leaving_no_trace(http, spot) as problems:
        for name, value in NO_VALUES.items():
            content = with_value(RUN, b'{"resume":' + value + b"}", key)
            answer = http.post(f"/threads/{spot.thread_id}/runs", content=content)
            if problem := refusal(answer):
                problems[name] = problem


def test_a_body_that_is_not_an_object_is_refused(http, spot):
    with leaving_no_trace(http, spot):
        for operation in BODIES:
            for content in NOT_OBJECTS:
                answer = send(http, spot, operation, content=content)
                assert 'is not of type "object"' in assert_refused(answer), operation


def test_a_body_is_parsed_as_json_whatever_its_content_type(http):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "x"):
        answer = http.post("/threads", content=b"{}", headers={"content-type": kind})
        assert answer.status_code == 200, kind


#: Levels around the arrays of `nested`: the body itself and `metadata`.
_AROUND = 2
_SIBLINGS = b'{"b": [{}, [], {"c": {}}]}'


@pytest.mark.parametrize("inner", [b"", b"1", b'"x"', b"null"])
@pytest.mark.parametrize("siblings", [b"1", _SIBLINGS])
def test_100_levels_of_nesting_are_kept_and_101_are_refused(http, inner, siblings):
    """A value in the innermost array does not count as a level."""

    def body(levels: int) -> bytes:
        deep = nested(levels - _AROUND, inner)
        return b'{"metadata": {"a": ' + deep + b', "b": ' + siblings + b"}}"

    taken = http.post("/threads", content=body(100))
    assert taken.status_code == 200, taken.text
    assert taken.json()["metadata"] == json.loads(body(100))["metadata"]
    assert_refused(http.post("/threads", content=body(101)))


def test_brackets_inside_strings_do_not_count_as_nesting(http):
    metadata = {"a": "[{" * 5_000, "[[" * 200: "}]"}
    assert http.post("/threads", json={"metadata": metadata}).json()["metadata"] == metadata


def test_siblings_do_not_count_as_nesting(http):
    metadata = {"a": [[{}]] * 2_000}
    assert http.post("/threads", json={"metadata": metadata}).json()["metadata"] == metadata


def test_a_run_with_data_nested_100_levels_deep_succeeds(http):
    """The arrays begin at level 3 of the body; in responses they are nested deeper."""
    note = json.loads(nested(97, b'"x"'))
    spot = new_spot(http, graph_input={"count": 1, "note": note})
    assert http.get(f"/threads/{spot.thread_id}").json()["values"] == {"count": 2, "note": note}
    assert http.get(f"/threads/{spot.thread_id}/state").json()["values"]["note"] == note
    history = http.get(f"/threads/{spot.thread_id}/history", params={"limit": 10}).json()
    assert history[0]["values"]["note"] == note
    listed = http.get(f"/threads/{spot.thread_id}/runs").json()
    assert listed[0]["status"] == "success"
    assert listed[0]["kwargs"]["input"]["note"] == note


# ---------------------------------------------------------------------------------------------
# Ids, routes and methods.

OPERATIONS = [
    ("GET /assistants/{assistant_id}", None),
    ("PATCH /assistants/{assistant_id}", {}),
    ("DELETE /assistants/{assistant_id}", None),
    ("POST /assistants/{assistant_id}/versions", {}),
    ("POST /assistants/{assistant_id}/latest", {"version": 1}),
    ("GET /assistants/{assistant_id}/graph", None),
    ("GET /assistants/{assistant_id}/schemas", None),
    ("GET /assistants/{assistant_id}/subgraphs", None),
    ("GET /assistants/{assistant_id}/subgraphs/{namespace}", None),
    ("GET /threads/{thread_id}", None),
    ("PATCH /threads/{thread_id}", {}),
    ("DELETE /threads/{thread_id}", None),
    ("POST /threads/{thread_id}/copy", None),
    ("GET /threads/{thread_id}/storage", None),
    ("GET /threads/{thread_id}/state", None),
    ("POST /threads/{thread_id}/state", {"values": {}}),
    ("PATCH /threads/{thread_id}/state", {}),
    ("GET /threads/{thread_id}/state/{checkpoint_id}", None),
    ("POST /threads/{thread_id}/state/checkpoint", {"checkpoint": {}}),
    ("GET /threads/{thread_id}/history", None),
    ("POST /threads/{thread_id}/history", {}),
    ("GET /threads/{thread_id}/runs", None),
    ("POST /threads/{thread_id}/runs", RUN),
    ("POST /threads/{thread_id}/runs/wait", RUN),
    ("POST /threads/{thread_id}/runs/stream", RUN),
    ("GET /threads/{thread_id}/runs/{run_id}", None),
    ("DELETE /threads/{thread_id}/runs/{run_id}", None),
    ("POST /threads/{thread_id}/runs/{run_id}/cancel", None),
    ("GET /threads/{thread_id}/runs/{run_id}/join", None),
    ("GET /threads/{thread_id}/runs/{run_id}/stream", None),
    ("GET /threads/{thread_id}/stream", None),
    ("POST /threads/{thread_id}/commands", {"id": 1, "method": "agent.getTree"}),
    ("POST /threads/{thread_id}/stream/events", {"channels": ["values"]}),
    ("POST /threads/{thread_id}/runs/crons", CRON),
    ("GET /runs/crons/{cron_id}", None),
    ("PATCH /runs/crons/{cron_id}", {"enabled": False}),
    ("DELETE /runs/crons/{cron_id}", None),
    ("GET /runs/{run_id}/join", None),
    ("GET /runs/{run_id}/stream", None),
]
PARAMETERS = {
    f"{operation} bad {name}": (operation, body, name)
    for operation, body in OPERATIONS
    for name in ("assistant_id", "thread_id", "run_id", "checkpoint_id", "cron_id")
    if f"{{{name}}}" in operation
}
BY_NAME = ("/graph", "/schemas", "/subgraphs")
_IN_PATHS_ONLY = (
    "%00",
    "%00" + "1" * 32,
    "%ff%fe",
    "%ed%a0%80",
    "%zz",
    "%",
    "%0d%0aX:%20y",
    "%F0%9F",
)


def _quoted(text: str) -> str:
    return "".join(f"%{byte:02X}" for byte in text.encode())


def test_the_table_has_every_path_with_an_id(http):
    paths = http.get("/openapi.json").json()["paths"]
    found = {
        f"{method.upper()} {path}"
        for path, methods in paths.items()
        for method in methods
        # test_agent_runs tests the agent runs API, which has other ids and error messages.
        if "{" in path and method != "parameters" and not path.startswith("/agent/")
    }
    assert found == {operation for operation, _ in OPERATIONS}


@pytest.mark.parametrize(
    ("parameter", "every"), each(PARAMETERS, thorough="GET /threads/{thread_id} bad thread_id")
)
def test_a_path_id_that_is_not_a_uuid_is_refused(http, spot, parameter, every):
    operation, body, name = PARAMETERS[parameter]
    method, path = operation.split(" ", 1)
    # Where a graph name is accepted, the text is not a known name either.
    named = any(f"}}{end}" in operation for end in BY_NAME)
    noun = "assistant: " if named else f"{name.removesuffix('_id')} ID"
    texts = [_quoted(text) for text in NO_UUID if text and "/" not in text] + list(_IN_PATHS_ONLY)
    with leaving_no_trace(http, spot) as problems:
        for text in first_and_last(texts, every=every):
            url = spot.url(path.replace(f"{{{name}}}", text.replace("{", "").replace("}", "")))
            answer = http.request(method, url, json=body)
            problem = refusal(answer)
            if problem or not answer.json()["detail"].startswith(f"Invalid {noun}"):
                problems[text] = problem or answer.text


#: In the streaming protocol a thread may be one that is yet to be created.
OF_THREADS_TO_COME = ("/commands", "/stream/events")


@pytest.mark.parametrize(
    ("operation", "body"),
    [one for one in OPERATIONS if not one[0].endswith(OF_THREADS_TO_COME)],
)
def test_an_unknown_resource_is_not_found(http, spot, operation, body):
    """Cover an unknown thread, and an unknown run on a thread that exists."""
    if "checkpoint_id" in operation:
        where = [replace(spot, thread_id=UNKNOWN)]
    elif "run_id" in operation:
        other = new_spot(http)
        where = [replace(spot, thread_id=UNKNOWN), replace(spot, run_id=UNKNOWN)]
        where += [replace(spot, run_id=other.run_id), replace(spot, run_id=str(uuid.UUID(int=0)))]
    else:
        where = [replace(spot, thread_id=UNKNOWN, cron_id=UNKNOWN)]
    with leaving_no_trace(http, spot):
        for place in where:
            # The API documents that an unknown thread that is to be copied is a conflict.
            status = 409 if operation.endswith("/copy") else 404
            assert_refused(send(http, place, operation, json=body), status)


@pytest.mark.parametrize(
    "spell",
    [
        str.upper,
        lambda text: text.replace("-", ""),
        lambda text: "{" + text + "}",
        lambda text: "{" + text.replace("-", "").upper() + "}",
    ],
    ids=["upper case", "no dashes", "braces", "all three"],
)
def test_an_id_is_accepted_in_any_spelling_and_returned_normalised(http, spell):
    thread_id, run_id = str(uuid.uuid4()), str(uuid.uuid4())
    made = http.post("/threads", json={"thread_id": spell(thread_id)})
    assert made.json()["thread_id"] == thread_id
    again = http.post("/threads", json={"thread_id": spell(thread_id)})
    assert assert_refused(again, 409) == f"Thread with ID {thread_id} already exists"
    path = f"/threads/{_quoted(spell(thread_id))}"
    run = http.post(f"{path}/runs", json={**RUN, "run_id": spell(run_id)})
    assert (run.json()["thread_id"], run.json()["run_id"]) == (thread_id, run_id)
    assert run.headers["content-location"] == f"/threads/{thread_id}/runs/{run_id}"
    assert http.get(f"{path}/runs/{_quoted(spell(run_id))}/join").json() == {"count": 2}
    assert http.get(f"{path}/runs/{_quoted(spell(run_id))}").json()["run_id"] == run_id
    found = http.post("/threads/search", json={"ids": [spell(thread_id)]}).json()
    assert [thread["thread_id"] for thread in found] == [thread_id]


NOWHERE = [
    *("GET /nope", "POST /ok", "GET /threads", "PUT /threads", "DELETE /threads"),
    *("GET /runs", "DELETE /runs/cancel", "GET /runs/wait", "PUT /runs", "GET /assistants"),
    *("PUT /threads/{thread_id}", "POST /threads/{thread_id}", "GET /threads/a/b/c/d/e"),
    *("PATCH /threads/{thread_id}/runs", "DELETE /threads/{thread_id}/runs"),
    *("POST /threads/{thread_id}/runs/{run_id}", "GET /threads/{thread_id}/runs/{run_id}/cancel"),
    *("POST /threads/{thread_id}/runs/{run_id}/join", "GET /threads/{thread_id}/nope"),
    *("DELETE /threads/{thread_id}/state", "PUT /threads/{thread_id}/history"),
    *("TRACE /threads", "PROPFIND /threads", "BREW /threads", "GET /threads/%2F/state"),
    *("GET /threads/..%2f..%2fetc%2fpasswd/x/y", "GET /docs/%2e%2e/%2e%2e/etc/passwd"),
    *("GET /docs/..%2f..%2fapp.py", "GET /%00", "GET /%ff", "GET /static/x", "GET /.env"),
]


def test_an_unknown_route_or_method_is_not_found(http, spot):
    with leaving_no_trace(http, spot) as problems:
        for operation in NOWHERE:
            answer = send(http, spot, operation)
            problem = refusal(answer, 404, 405)
            expected = "Not Found" if answer.status_code == 404 else "Method Not Allowed"
            if problem or answer.json() != {"detail": expected}:
                problems[operation] = problem or answer.text


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/threads", "OPTIONS, POST"),
        ("DELETE", "/ok", "GET, HEAD, OPTIONS"),
        ("POST", f"/threads/{UNKNOWN}", "DELETE, GET, HEAD, OPTIONS, PATCH"),
    ],
)
def test_another_method_of_a_known_path_is_not_allowed(http, method, path, allowed):
    answer = http.request(method, path, json={})
    assert answer.status_code == 405
    assert answer.headers["Allow"] == allowed


# ---------------------------------------------------------------------------------------------
# Query strings and headers.

LIST_RUNS = [
    *("limit=x", "limit=", "limit=-1", "limit=1.5", "limit=true", "limit=null"),
    *("limit=1e2", "limit=0x5", "limit=1_0", "limit=%EF%BC%95", "limit=%C2%B2", "limit=%00"),
    *("limit=5%00", "limit=%ff", f"limit={10**30}", f"limit=-{10**30}", "limit=" + "9" * 3900),
    *("offset=x", "offset=", "offset=-1", "offset=1.5", f"offset={2**63}", f"offset={10**30}"),
    *("offset=%C2%B2", "offset=1_0"),
    *("status=bad", "status=", "status=PENDING", "status=all", "status=%00", "status=%ff"),
    *("status=pending%20", "status=pending%0A", "status='%20OR%201=1--", "status=%ed%a0%80"),
    *("select=nope", "select=", "select=*", "select=run_id,status", "select=run_id&select=nope"),
    *('select=["nope"]', "select=[1]", "select=[[]]", "select=[", "select=[{}]"),
    *("select=claim_no", "select=lease_owner", "select=__class__", "select=%00", "select=RUN_ID"),
]


def test_listing_runs_with_an_invalid_query_is_refused(http, spot):
    url = f"/threads/{spot.thread_id}/runs"
    assert_none({query: refusal(http.get(f"{url}?{query}")) for query in LIST_RUNS})


def test_listing_runs_accepts_the_bounds_and_every_status_and_field(http):
    spot = new_spot(http)
    url = f"/threads/{spot.thread_id}/runs"
    ok = ["limit=0", "limit=1", "limit=1000", "offset=0", "offset=1000000"]
    ok += [f"status={s}" for s in ("pending", "running", "error", "timeout", "interrupted")]
    for query in ok:
        assert http.get(f"{url}?{query}").status_code == 200, query
    assert [r["run_id"] for r in http.get(f"{url}?status=success").json()] == [spot.run_id]
    fields = ["run_id", "thread_id", "assistant_id", "created_at", "updated_at", "status"]
    fields += ["metadata", "kwargs", "multitask_strategy"]
    assert list(http.get(url, params={"select": fields}).json()[0]) == fields
    assert list(http.get(url, params={"select": json.dumps(fields)}).json()[0]) == fields


HISTORY = [
    *(
        "limit=x",
        "limit=",
        "limit=-1",
        "limit=1001",
        "limit=1.5",
        "limit=%C2%B2",
        "limit=%E2%91%A0",
    ),
    *("limit=1_0", "limit=%EF%BC%95", "limit=%00", f"limit={10**30}", "limit=" + "9" * 3900),
    *("before=bad", "before=", "before=%00", "before={}", "before=0x" + "1" * 30),
]


def test_reading_history_with_an_invalid_query_is_refused(http, spot):
    url = f"/threads/{spot.thread_id}/history"
    assert_none({query: refusal(http.get(f"{url}?{query}")) for query in HISTORY})


QUERIES = [
    *(("GET /threads/{thread_id}/runs/{run_id}/join", q) for q in ("on_disconnect=bad",)),
    *(
        ("GET /threads/{thread_id}/stream", q)
        for q in ("stream_mode=values", "stream_modes=bad", 'stream_modes=["lifecycle","x"]')
    ),
    *(
        ("GET /threads/{thread_id}/runs/{run_id}/stream", q)
        for q in (
            *("on_disconnect=bad", "on_disconnect=", "stream_mode=bad", "stream_mode=%00"),
            *("stream_mode=values&stream_mode=bad", 'stream_mode=["values","bad"]'),
            *("stream_mode=tools", "stream_mode=lifecycle", "stream_mode=run_modes"),
            *("stream_mode=VALUES", "stream_mode=values,bad"),
        )
    ),
    *(
        (operation, "on_disconnect=bad")
        for operation in CREATES_A_RUN
        if operation.endswith(("wait", "stream"))
    ),
    *(
        ("POST /threads/{thread_id}/runs/{run_id}/cancel", f"action={action}")
        for action in ("bad", "", "INTERRUPT", "interrupt%20", "%00", "rollback,interrupt", "%ff")
    ),
    *(("POST /runs/cancel", f"action={action}") for action in ("bad", "", "ROLLBACK", "%00")),
]


def test_an_invalid_query_parameter_is_refused(http, spot):
    with leaving_no_trace(http, spot) as problems:
        for operation, query in QUERIES:
            method, path = operation.split(" ", 1)
            body = spot.body(BODIES[operation][0]) if operation in BODIES else None
            answer = http.request(method, f"{spot.url(path)}?{query}", json=body)
            if problem := refusal(answer):
                problems[f"{operation}?{query}"] = problem


def test_an_invalid_cancel_action_cancels_nothing(http):
    thread_id = http.post("/threads", json={}).json()["thread_id"]
    run_id = http.post(f"/threads/{thread_id}/runs", json=LATER).json()["run_id"]
    run = f"/threads/{thread_id}/runs/{run_id}"
    body = {"thread_id": thread_id, "run_ids": [run_id]}
    for action in ("bad", "", "Interrupt"):
        for wait in ("0", "1"):
            assert_refused(http.post(f"{run}/cancel", params={"action": action, "wait": wait}))
        assert_refused(http.post("/runs/cancel", params={"action": action}, json=body))
    assert http.get(run).json()["status"] == "pending"
    assert http.delete(run).status_code == 200


#: Texts that are not event ids; Redis would reject the later ones.
NO_EVENT_ID = [
    *(b"x", b"-5", b"--", b"1-1-1", b"1-x", b"1.5-0", b"\xb2-0", b"\xff", b"null", b"9" * 5000),
    *(b"1-", b"+1-0", b"1-+1", b"1_0-0", b"\xa01-0", b"1 -0", b"99999999999999999999-0"),
    *(b"1-99999999999999999999", b"1-18446744073709551616"),
]


@pytest.mark.parametrize("event_id", NO_EVENT_ID, ids=lambda event_id: repr(event_id[:24]))
def test_an_invalid_last_event_id_is_refused(http, event_id):
    thread_id = http.post("/threads", json={}).json()["thread_id"]
    body = {**LATER, "stream_resumable": True}
    run_id = http.post(f"/threads/{thread_id}/runs", json=body).json()["run_id"]
    url = f"/threads/{thread_id}/runs/{run_id}"
    # Read only the head: an accepted stream would last as long as the run.
    with http.stream("GET", f"{url}/stream", headers={b"Last-Event-ID": event_id}) as answer:
        if answer.status_code != 200:
            answer.read()
    http.delete(url)
    assert answer.status_code == 422
    assert_refused(answer)


def test_a_request_id_may_be_any_header_value(http):
    for value in (b"\xff\xfe", b"x" * 4000, b"a\tb", b"'; DROP TABLE run;--", b"{0} %s \\u0000"):
        answer = http.post("/runs/wait", json=RUN, headers={b"x-request-id": value})
        assert answer.json() == {"count": 2}, value


def exchange(server, request: bytes, *, half_close: bool = False) -> bytes:
    """Send raw bytes to the server and return all that it sends back."""
    answer = b""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(request)
        if half_close:
            connection.shutdown(socket.SHUT_WR)
        while chunk := connection.recv(65536):
            answer += chunk
    return answer


_HEAD = b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
NOT_HTTP = {
    "a NUL in the path": b"GET /threads/\x00" + _HEAD + b"\r\n",
    "a NUL in the query": b"GET /ok?a=\x00" + _HEAD + b"\r\n",
    "a NUL in a header": b"GET /ok" + _HEAD + b"X-Request-Id: a\x00b\r\n\r\n",
    "a NUL in a header's name": b"GET /ok" + _HEAD + b"X-\x00: a\r\n\r\n",
    "non-ASCII bytes in the path": b"GET /threads/\xff\xfe" + _HEAD + b"\r\n",
    "a non-numeric length": b"POST /threads" + _HEAD + b"Content-Length: x\r\n\r\n{}",
    "a negative length": b"POST /threads" + _HEAD + b"Content-Length: -1\r\n\r\n{}",
    "a very long path": b"GET /" + b"a" * 6000 + _HEAD + b"\r\n",
    "not HTTP": b"nonsense\r\n\r\n",
}


@pytest.mark.parametrize("name", NOT_HTTP)
def test_malformed_http_is_refused_and_the_server_keeps_serving(server, http, spot, name):
    """gunicorn sends these responses, before the application gets a request."""
    with leaving_no_trace(http, spot):
        answer = exchange(server, NOT_HTTP[name])
        assert answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 414 ", b"HTTP/1.1 431 ")), answer
    assert http.get("/ok").json()["ok"] is True


def test_a_body_larger_than_allowed_is_refused_before_it_is_read(server, http, spot):
    with leaving_no_trace(http, spot):
        head = b"POST /threads" + _HEAD + b"Content-Length: 99999999999\r\n\r\n"
        status, _, body = exchange(server, head).partition(b"\r\n\r\n")
    assert status.startswith(b"HTTP/1.1 413 ")
    assert list(json.loads(body)) == ["detail"]


def _refused_by_the_application(answer: bytes) -> bool:
    head, _, body = answer.partition(b"\r\n\r\n")
    return head.startswith(b"HTTP/1.1 4") and list(json.loads(body)) == ["detail"]


@pytest.mark.parametrize("chunks", [b"zz\r\n{}\r\n0\r\n\r\n", b"-2\r\n{}\r\n0\r\n\r\n", b"\r\n"])
def test_a_broken_chunked_body_is_refused(server, http, spot, chunks):
    with leaving_no_trace(http, spot):
        head = b"POST /threads" + _HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
        answer = exchange(server, head + chunks, half_close=True)
        assert _refused_by_the_application(answer), answer


_NEXT = b"GET /info HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
#: Chunked bodies that gunicorn refuses, and after that point bytes that look like a request.
SMUGGLED = {
    "a wrong size": b"zz\r\n" + _NEXT,
    "a long extension": b"2;a=" + b"a" * 16_380 + _NEXT + b"{}\r\n0\r\n\r\n",
    "an invalid extension": b"2;\x01\r\n" + _NEXT,
    "a missing terminator": b"2\r\n{}" + _NEXT,
    "long trailers": b"2\r\n{}\r\n0\r\nX-T: " + b"a" * 400_000 + _NEXT,
    "a wrong trailer": b"2\r\n{}\r\n0\r\n\x01: a\r\n\r\n" + _NEXT,
}


@pytest.mark.parametrize("path", ["/threads", "/nowhere"])
@pytest.mark.parametrize("kind", SMUGGLED)
def test_nothing_after_a_broken_chunked_body_is_taken_for_a_request(server, path, kind):
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer = exchange(server, head.encode() + SMUGGLED[kind])
    assert answer.count(b"HTTP/1.1 ") == 1
    assert answer.startswith(b"HTTP/1.1 4")


def test_a_truncated_body_creates_nothing(server, http, spot):
    """The two bytes received are valid JSON, but fewer than the Content-Length."""
    with leaving_no_trace(http, spot):
        request = b"POST /threads" + _HEAD + b"Content-Length: 10\r\n\r\n{}"
        answer = exchange(server, request, half_close=True)
        assert answer == b"" or _refused_by_the_application(answer), answer


# ---------------------------------------------------------------------------------------------
# Cancelling many runs: the bodies accepted.


@pytest.fixture
def waiting(http):
    """Yield a pending run that does not start during the test."""
    thread_id = http.post("/threads", json={}).json()["thread_id"]
    run = http.post(f"/threads/{thread_id}/runs", json=LATER).json()
    yield run
    http.delete(f"/threads/{thread_id}")


def test_a_bulk_cancel_without_a_valid_selection_is_refused(http, waiting):
    thread_id, run_id = waiting["thread_id"], waiting["run_id"]
    bodies: list[dict[str, Any]] = [
        {},
        {"nope": 1},
        {"thread_id": thread_id},
        {"run_ids": [run_id]},
        {"run_ids": []},
        {"status": "pending", "thread_id": thread_id},
        {"status": "pending", "run_ids": [run_id]},
        {"status": "ALL"},
        {"status": "interrupted"},
        {"status": None},
        {"status": ["pending"]},
        {"status": None, "thread_id": thread_id, "run_ids": [run_id]},
        {"status": "pending", "thread_id": None, "run_ids": None},
        {"thread_id": thread_id, "run_ids": None},
        {"thread_id": thread_id, "run_ids": run_id},
        {"thread_id": None, "run_ids": [run_id]},
        {"thread_id": "bad", "run_ids": [run_id]},
        {"thread_id": thread_id, "run_ids": [run_id, "bad"]},
    ]
    for body in bodies:
        for action in ("interrupt", "rollback"):
            answer = http.post("/runs/cancel", params={"action": action}, json=body)
            assert refusal(answer) is None, body
    found = http.get(f"/threads/{thread_id}/runs/{run_id}").json()
    assert found["status"] == "pending"


def test_a_bulk_cancel_that_matches_nothing_is_404_and_cancels_nothing(http, waiting):
    thread_id, run_id = waiting["thread_id"], waiting["run_id"]
    other = new_spot(http)
    bodies = [
        {"thread_id": thread_id, "run_ids": []},
        {"thread_id": thread_id, "run_ids": [UNKNOWN]},
        {"thread_id": UNKNOWN, "run_ids": [run_id]},
        {"thread_id": other.thread_id, "run_ids": [run_id]},
        {"thread_id": other.thread_id, "run_ids": [other.run_id]},
        {"status": "running", "thread_id": thread_id, "run_ids": [run_id]},
    ]
    for body in bodies:
        assert refusal(http.post("/runs/cancel", json=body), 404) is None, body
    assert http.get(f"/threads/{thread_id}/runs/{run_id}").json()["status"] == "pending"


@pytest.mark.parametrize("more", [{}, {"status": "pending"}, {"status": "all"}, {"nope": None}])
def test_a_bulk_cancel_by_ids_with_or_without_a_status_cancels(http, waiting, more):
    thread_id, run_id = waiting["thread_id"], waiting["run_id"]
    body = {"thread_id": thread_id, "run_ids": [UNKNOWN, run_id, run_id], **more}
    answer = http.post("/runs/cancel", json=body)
    assert (answer.status_code, answer.content) == (204, b"")
    assert http.get(f"/threads/{thread_id}/runs/{run_id}").json()["status"] == "interrupted"


# ---------------------------------------------------------------------------------------------
# Runs whose options contradict each other or the thread.

CONTRADICTIONS = [
    ({"context": {"by": 1}, "config": {"configurable": {"by": 2}}}, 400),
    ({"assistant_id": UNKNOWN}, 404),
    ({"assistant_id": "nope"}, 422),
    ({"assistant_id": "counter "}, 422),
    ({"assistant_id": "Counter"}, 422),
    ({"assistant_id": "0x" + "1" * 30}, 422),
]


@pytest.mark.parametrize("operation", CREATES_A_RUN)
@pytest.mark.parametrize(("more", "status"), CONTRADICTIONS)
def test_a_rejected_create_leaves_no_run_and_no_thread(http, spot, operation, more, status):
    fresh = replace(spot, thread_id=str(uuid.uuid4()))
    with leaving_no_trace(http, spot):
        assert_refused(send(http, spot, operation, json={**RUN, **more}), status)
        body = {**RUN, "if_not_exists": "create", "on_completion": "keep", **more}
        assert_refused(send(http, fresh, operation, json=body), status)
        assert_refused(http.get(f"/threads/{fresh.thread_id}"), 404)


@pytest.mark.parametrize("operation", [o for o in CREATES_A_RUN if o.startswith("POST /runs")])
def test_resuming_a_stateless_run_is_refused_with_400(http, spot, operation):
    with leaving_no_trace(http, spot):
        body = {"assistant_id": "questions", "command": {"resume": "yes"}}
        detail = assert_refused(send(http, spot, operation, json=body), 400)
    assert detail == "You must provide a thread_id when resuming."


def test_an_assistant_with_context_and_configurable_is_refused(http, spot):
    with leaving_no_trace(http, spot):
        both = {"context": {"by": 1}, "config": {"configurable": {"by": 2}}}
        assert_refused(http.post("/assistants", json={"graph_id": "counter", **both}), 400)


@pytest.mark.parametrize(
    "command", [{}, {"goto": []}, {"goto": ""}, {"update": []}, {"resume": None}]
)
def test_an_empty_command_causes_no_internal_error(http, command):
    spot = new_spot(http)
    body = {"assistant_id": "counter", "command": command}
    answer = http.post(f"/threads/{spot.thread_id}/runs/wait", json=body)
    if answer.status_code == 200 and "__error__" in answer.json():
        error = answer.json()["__error__"]
        assert error["error"] not in ("UnboundLocalError", "TypeError", "AttributeError"), error
    elif answer.status_code != 200:
        assert_refused(answer, 400, 422)


def test_an_input_of_the_wrong_type_ends_the_run_with_an_error(http):
    for graph_input in (5, "x", "", True, [], [1], [["count", 1]], 1.5):
        thread_id = http.post("/threads", json={}).json()["thread_id"]
        body = {"assistant_id": "counter", "input": graph_input}
        answer = http.post(f"/threads/{thread_id}/runs/wait", json=body).json()
        assert answer["__error__"]["error"] == "InvalidUpdateError", graph_input
        thread = http.get(f"/threads/{thread_id}").json()
        assert (thread["status"], thread["error"]) == ("error", answer["__error__"])


def test_no_input_on_a_new_thread_ends_the_run_with_an_error(http):
    for body in ({"assistant_id": "counter"}, {"assistant_id": "counter", "input": None}):
        assert http.post("/runs/wait", json=body).json()["__error__"]["error"] == "EmptyInputError"


@pytest.mark.parametrize(
    "more",
    [
        {"checkpoint_id": UNKNOWN},
        {"checkpoint": {"checkpoint_id": UNKNOWN}},
        {"config": {"configurable": {"checkpoint_id": UNKNOWN}}},
        {"checkpoint": {"checkpoint_id": "{other}"}},
        {"checkpoint": {"checkpoint_id": "{checkpoint_id}", "checkpoint_ns": "nope"}},
        {"checkpoint": {"checkpoint_ns": "nope"}},
        {"checkpoint": {"checkpoint_ns": "a|b:c"}},
    ],
    ids=["id", "checkpoint", "configurable", "of another thread", "both", "namespace", "deep"],
)
@pytest.mark.parametrize("graph_input", [{"count": 100}, None], ids=["input", "no input"])
def test_a_run_from_an_unknown_checkpoint_leaves_the_state_unchanged(http, more, graph_input):
    """The run is rejected or fails, and the thread's state stays unchanged."""
    spot, other = new_spot(http), new_spot(http)
    before = http.get(f"/threads/{spot.thread_id}/state").json()
    filled = json.loads(json.dumps(more).replace("{other}", other.checkpoint_id))
    body = {**RUN, "input": graph_input, **spot.body(filled)}
    answer = http.post(f"/threads/{spot.thread_id}/runs/wait", json=body)
    if answer.status_code == 200:
        assert list(answer.json()) == ["__error__"]
    else:
        assert_refused(answer, 400, 404, 422)
    after = http.get(f"/threads/{spot.thread_id}/state").json()
    assert (after["values"], after["checkpoint_id"]) == (before["values"], before["checkpoint_id"])


# ---------------------------------------------------------------------------------------------
# States.


def test_the_state_at_an_unknown_checkpoint_is_empty_or_not_found(http, spot):
    """The response is an empty state, as in the reference, or 404."""
    url = f"/threads/{spot.thread_id}/state"
    answers = [
        http.get(f"{url}/{UNKNOWN}"),
        http.post(f"{url}/checkpoint", json={"checkpoint": {"checkpoint_id": UNKNOWN}}),
        http.post(f"{url}/checkpoint", json={"checkpoint": {"checkpoint_ns": "nope"}}),
    ]
    for answer in answers:
        if answer.status_code == 200:
            assert (answer.json()["values"], answer.json()["next"]) == ({}, [])
        else:
            assert_refused(answer, 400, 404)


def test_history_before_an_unknown_checkpoint_is_returned_or_not_found(http, spot):
    url = f"/threads/{spot.thread_id}/history"
    for before in (UNKNOWN, str(uuid.UUID(int=0))):
        for body in ({"before": before}, {"before": {"configurable": {"checkpoint_id": before}}}):
            assert http.post(url, json=body).status_code in (200, 404), body


STEPS = {"seconds": 0}
CHAT = {"messages": [{"role": "user", "content": "hi"}]}
UPDATES = [
    *(
        ("counter", None, {"values": values})
        for values in (5, "x", True, 1.5, [1], [["a", 1]], [{}])
    ),
    *(("steps", STEPS, {"values": {"steps": s}}) for s in (5, "x", {"a": 1}, None, True)),
    *(
        ("chat", CHAT, {"values": {"messages": m}, "as_node": "echo"})
        for m in (
            *(5, True, None, [5], [None], [True], [[]], [["x"]], [{}]),
            *({"role": "user"}, {"role": "user", "content": 5}, [{"role": "no", "content": "x"}]),
            *({"lc": 1, "type": "secret", "id": ["PATH"]}, {"type": "remove", "id": "nope"}),
        )
    ),
    *(
        ("steps", STEPS, {"values": {"steps": ["x"]}, "as_node": node})
        for node in ("nope", "", "__interrupt__", "__pregel_tasks", "s1|s2", "s1:1", "S1")
    ),
    *(
        ("steps", STEPS, {"values": values, "as_node": "s1"})
        for values in (5, "x", [5], [[]], {"steps": 5})
    ),
    ("steps", STEPS, {"values": {"steps": ["x"]}, "as_node": "__end__"}),
    ("counter", None, {"values": {"count": 1}, "checkpoint": {"checkpoint_ns": "nope"}}),
    ("counter", None, {"values": {"count": 1}, "checkpoint": {"checkpoint_ns": "a|b:c"}}),
]


@pytest.fixture(scope="module")
def spots(http):
    """Return one idle thread for each graph whose state is tested."""
    return {
        "counter": new_spot(http),
        "steps": new_spot(http, "steps", STEPS),
        "chat": new_spot(http, "chat", CHAT),
    }


@pytest.mark.parametrize(
    ("graph", "body"),
    [
        pytest.param(graph, body, id=f"{graph} {json.dumps(body)[:90]}")
        for graph, _, body in UPDATES
    ],
)
def test_a_state_update_the_graph_rejects_is_400_and_writes_nothing(http, spots, graph, body):
    spot = spots[graph]
    with leaving_no_trace(http, spot):
        assert_refused(http.post(f"/threads/{spot.thread_id}/state", json=body), 400)


def test_a_state_update_at_an_unknown_checkpoint_is_not_found(http, spot):
    url = f"/threads/{spot.thread_id}/state"
    with leaving_no_trace(http, spot):
        for where in ({"checkpoint_id": UNKNOWN}, {"checkpoint": {"checkpoint_id": UNKNOWN}}):
            body = {"values": {"count": 1}, **where}
            assert UNKNOWN in assert_refused(http.post(url, json=body), 404)


def test_a_state_update_of_a_thread_without_a_graph_is_refused(http):
    for metadata in ({}, {"graph_id": "nope"}, {"graph_id": 5}, {"graph_id": None}):
        thread = http.post("/threads", json={"metadata": metadata}).json()
        url = f"/threads/{thread['thread_id']}/state"
        assert "graph ID" in assert_refused(http.post(url, json={"values": {"count": 1}}), 400)
        assert http.get(url).json()["values"] == {}


# ---------------------------------------------------------------------------------------------
# Unusual but allowed: stored exactly as sent.

STRANGE: dict[str, Any] = {
    "interrupt": {"__interrupt__": [{"value": 1, "id": "x"}]},
    "error": {"__error__": {"error": "ValueError", "message": "no"}},
    "lc constructor": {
        "lc": 1,
        "type": "constructor",
        "id": ["langchain", "schema", "messages", "HumanMessage"],
        "kwargs": {"content": "x"},
    },
    "lc secret": {"lc": 1, "type": "secret", "id": ["PATH"]},
    "lc not implemented": {"lc": 2, "type": "not_implemented", "id": ["os", "system"], "repr": "x"},
    "event": "a\r\nevent: error\r\ndata: {}\r\nid: 9-9\r\n\r\n",
    "lines": "\n\r\n\r\u0085\u2028\u2029\v\f",
    "sql": "'; DROP TABLE thread; --",
    "formats": "%s %(thread_id)s {0} {x} ${PATH} \\1 $1 %00 \\x00",
    "escapes": "\\u0000 \\\\u0000 \\ud800",
    "marks": "\ufeff\ufffd\U0001f600\u202e e\u0301",
    "numbers": [0, -1, 2**53 + 1, 2**63 - 1, -(2**63), 1e308, 5e-324, 0.1],
    "nothing": [None, "", [], {}, [[]], {"": ""}],
    "keys": {"": 1, " ": 2, "a.b": 3, "a": {"b": 4}, "'": 5, '"': 6, "$": 7, "\\": 8, "%": 9},
    "prototype": {"__proto__": 1, "constructor": 2, "__class__": 3, "__root__": 4},
}


def test_unusual_data_in_a_state_is_returned_unchanged(http):
    spot = new_spot(http, graph_input={"count": 1, "note": STRANGE})
    thread = http.get(f"/threads/{spot.thread_id}").json()
    assert thread["status"] == "idle"
    assert thread["values"] == {"count": 2, "note": STRANGE}
    assert http.get(f"/threads/{spot.thread_id}/state").json()["values"]["note"] == STRANGE
    run = http.get(f"/threads/{spot.thread_id}/runs/{spot.run_id}").json()
    assert run["kwargs"]["input"] == {"count": 1, "note": STRANGE}
    found = http.post("/threads/search", json={"values": {"note": {"keys": STRANGE["keys"]}}})
    assert [row["thread_id"] for row in found.json()] == [spot.thread_id]
    body = {"values": {"note": {"again": STRANGE}}}
    assert http.post(f"/threads/{spot.thread_id}/state", json=body).status_code == 200
    after = http.get(f"/threads/{spot.thread_id}").json()["values"]
    assert after == {"count": 2, "note": {"again": STRANGE}}


def test_unusual_metadata_config_and_context_are_returned_unchanged(http):
    body = {**RUN, "metadata": STRANGE, "context": {"by": 4, "strange": STRANGE}}
    thread = http.post("/threads", json={"metadata": STRANGE}).json()
    assert thread["metadata"] == STRANGE
    url = f"/threads/{thread['thread_id']}/runs"
    run = http.post(url, json=body).json()
    assert {key: run["metadata"][key] for key in STRANGE} == STRANGE
    assert http.get(f"{url}/{run['run_id']}/join").json() == {"count": 5}
    body = {**RUN, "config": {"configurable": {"by": 5, "x": STRANGE}, "tags": ["'\r\n%s", ""]}}
    assert http.post(f"{url}/wait", json=body).json() == {"count": 6}
    assert http.get(f"/threads/{thread['thread_id']}").json()["config"]["tags"] == ["'\r\n%s", ""]


def test_unusual_data_does_not_break_an_event_stream(http):
    body = {
        "assistant_id": "counter",
        "input": {"count": 1, "note": STRANGE},
        "stream_mode": ["values", "updates"],
        "stream_resumable": True,
    }
    text = http.post("/runs/stream", json=body).content.decode()
    fields = [line.split(": ", 1) for line in text.split("\n") if line and line[0] != ":"]
    assert {name for name, _ in fields} == {"event", "data", "id"}
    assert {value for name, value in fields if name == "event"} == {"metadata", "values", "updates"}
    data = [json.loads(value) for name, value in fields if name == "data"]
    assert data[1] == {"count": 1, "note": STRANGE}
    assert data[-1] == {"count": 2, "note": STRANGE}


def test_reserved_keys_in_an_input_do_not_control_the_run(http):
    words = ("__interrupt__", "__error__", "__resume__", "__start__", "__end__", "__pregel_tasks")
    for word in words:
        thread_id = http.post("/threads", json={}).json()["thread_id"]
        body = {"assistant_id": "counter", "input": {"count": 1, word: [{"value": 1}]}}
        answer = http.post(f"/threads/{thread_id}/runs/wait", json=body).json()
        assert answer == {"count": 2}, word
        thread = http.get(f"/threads/{thread_id}").json()
        assert (thread["status"], thread["interrupts"]) == ("idle", {}), word


METADATA_KEYS = [
    *("a.b", "a->b", "a'; DROP TABLE thread; --", "a') OR 1=1 --", "$.a", "%", "_", "", " ", "{a}"),
    *("a\r\nb", "%(thread_id)s", "\\", '"', "?", "@>", "\u2028", "__proto__", "thread_id"),
]


@pytest.mark.parametrize("key", METADATA_KEYS, ids=repr)
def test_a_search_by_an_unusual_metadata_key_finds_only_its_thread(http, key):
    value = str(uuid.uuid4())
    mine = http.post("/threads", json={"metadata": {key: value}}).json()
    http.post("/threads", json={"metadata": {"a": {"b": value}}})
    http.post("/threads", json={"metadata": {f"{key}x": value}})
    assert mine["metadata"] == {key: value}
    found = http.post("/threads/search", json={"metadata": {key: value}})
    assert [row["thread_id"] for row in found.json()] == [mine["thread_id"]]
    assert found.headers["x-pagination-total"] == "1"


def test_an_assistant_name_is_searched_for_literally(http):
    mark = uuid.uuid4().hex
    for name in (f"{mark} 100%_a", f"{mark} 100xxa", f"{mark} 100\\a"):
        http.post("/assistants", json={"graph_id": "counter", "name": name})
    for part, count in ((f"{mark} 100%", 1), (f"{mark} 100_", 0), ("100\\a", 1), ("' OR 1=1--", 0)):
        found = http.post("/assistants/search", json={"name": part})
        assert (found.status_code, len(found.json())) == (200, count), part


#: Keys that only the server may set, or that would control LangGraph's internals.
RESERVED: dict[str, Any] = {
    "thread_id": "evil",
    "run_id": "evil",
    "assistant_id": "evil",
    "graph_id": "evil",
    "checkpoint_ns": "evil",
    "checkpoint_map": {"": "evil"},
    "langgraph_auth_user": {"identity": "evil"},
    "langgraph_auth_user_id": "evil",
    "langgraph_auth_permissions": ["evil"],
    "langgraph_request_id": "evil",
    "__pregel_checkpointer": "evil",
    "__pregel_runtime": "evil",
    "__pregel_stream": "evil",
    "__pregel_node_finished": "evil",
    "__pregel_resuming": True,
    "__request_start_time_ms__": "evil",
}


@pytest.mark.parametrize("carrier", ["configurable", "context"])
@pytest.mark.parametrize("owner", ["run", "assistant"])
def test_reserved_keys_of_a_client_never_reach_the_graphs_config(http, owner, carrier):
    given = {**RESERVED, "by": 5}
    carried = {"context": given} if carrier == "context" else {"config": {"configurable": given}}
    body: dict[str, Any] = dict(RUN)
    if owner == "assistant":
        made = http.post("/assistants", json={"graph_id": "counter", **carried})
        assert made.status_code == 200
        body["assistant_id"] = made.json()["assistant_id"]
    else:
        body |= carried
    thread_id = http.post("/threads", json={}).json()["thread_id"]
    run = http.post(f"/threads/{thread_id}/runs", json=body).json()
    configurable = run["kwargs"]["config"]["configurable"]
    assert configurable["thread_id"] == thread_id
    assert configurable["langgraph_auth_user"] is None
    assert [key for key, value in configurable.items() if "evil" in json.dumps(value)] == []
    assert [key for key in configurable if key.startswith("__pregel_")] == []
    # The client's other values apply, and the checkpoints are those of the thread.
    outcome = http.get(f"/threads/{thread_id}/runs/{run['run_id']}/join").json()
    assert outcome == {"count": 6}
    assert http.get(f"/threads/{thread_id}/state").json()["values"] == {"count": 6}


def test_a_client_cannot_set_reserved_metadata(http):
    thread_id = http.post("/threads", json={}).json()["thread_id"]
    evil = {"run_id": "evil", "thread_id": "evil", "assistant_id": "evil", "cron_id": "evil"}
    body = {**RUN, "metadata": {**evil, "mine": 1}, "config": {"metadata": {**evil, "also": 2}}}
    run = http.post(f"/threads/{thread_id}/runs", json=body).json()
    assert run["metadata"]["mine"] == 1
    assert run["kwargs"]["config"]["metadata"]["also"] == 2
    assert "evil" not in json.dumps(run["metadata"])
    assert "evil" not in json.dumps(run["kwargs"]["config"]["metadata"])
    http.get(f"/threads/{thread_id}/runs/{run['run_id']}/join")
    assert "evil" not in json.dumps(http.get(f"/threads/{thread_id}/state").json()["metadata"])


# ---------------------------------------------------------------------------------------------
# One id in many requests at once.


def _at_once(server, requests: list[tuple[str, dict[str, Any]]]) -> list[httpx.Response]:
    barrier = threading.Barrier(len(requests))
    answers: list[httpx.Response] = []

    def ask(path: str, body: dict[str, Any]) -> None:
        with watched(httpx.Client(base_url=server.url, timeout=60)) as http:
            http.get("/ok")  # open the connection before the barrier
            barrier.wait()
            answers.append(http.post(path, json=body))

    threads = [threading.Thread(target=ask, args=request) for request in requests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


@pytest.mark.parametrize("round_", range(3))
def test_concurrent_creates_with_one_run_id_create_one_run(server, http, round_):
    threads = [http.post("/threads", json={}).json()["thread_id"] for _ in range(8)]
    body = {**RUN, "run_id": str(uuid.uuid4())}
    answers = _at_once(server, [(f"/threads/{thread_id}/runs", body) for thread_id in threads])
    assert sorted(answer.status_code for answer in answers) == [200] + [409] * 7
    for answer in answers:
        assert answer.status_code == 200 or refusal(answer, 409) is None
    counts = [len(http.get(f"/threads/{thread_id}/runs").json()) for thread_id in threads]
    assert sorted(counts) == [0] * 7 + [1]


@pytest.mark.parametrize("kind", ["thread", "assistant"])
def test_concurrent_creates_with_one_id_succeed_once(server, kind):
    name = f"{kind}_id"
    body = {name: str(uuid.uuid4()), **({"graph_id": "counter"} if kind == "assistant" else {})}
    answers = _at_once(server, [(f"/{kind}s", body)] * 8)
    assert sorted(answer.status_code for answer in answers) == [200] + [409] * 7
    again = _at_once(server, [(f"/{kind}s", {**body, "if_exists": "do_nothing"})] * 4)
    assert {(answer.status_code, answer.json()[name]) for answer in again} == {(200, body[name])}


@pytest.mark.parametrize(
    ("url", "detail"),
    [
        ("notaurl", "Invalid webhook hostname ''"),
        ("/relative", "Invalid webhook hostname ''"),
        ("ftp://example.com", "Invalid webhook scheme 'ftp'"),
        ("http://127.0.0.1/x", "Webhook host blocked: loopback IP range"),
        ("http://localhost:8080", "Webhook host blocked: loopback IP range"),
        ("http://[::1]/", "Webhook host blocked: loopback IP range"),
        ("http://169.254.169.254/latest/meta-data", "Webhook host blocked: link-local IP range"),
        ("http://10.1.2.3", "Webhook host blocked: private IP range"),
        ("http://u:p@example.com", "user"),
        ("", "webhook"),
        (5, "webhook"),
    ],
)
def test_an_invalid_or_private_webhook_is_refused_and_creates_nothing(
    http, sync_client, url, detail
):
    thread_id = new_thread(http)
    body = {"assistant_id": "counter", "input": {"count": 1}, "webhook": url}
    for path in (f"/threads/{thread_id}/runs", "/runs", "/runs/stream"):
        assert detail in refused(http.post(path, json=body), 422)
    assert detail in refused(http.post("/runs/batch", json=[body]), 422)
    cron = {**body, "schedule": "0 0 1 1 *"}
    assert detail in refused(http.post("/runs/crons", json=cron), 422)
    assert sync_client.runs.list(thread_id) == []


def test_a_public_webhook_is_accepted(http):
    body = {"assistant_id": "counter", "webhook": "https://hooks.invalid/run"}
    assert http.post("/runs", json={**body, "after_seconds": 3600}).status_code == 200
