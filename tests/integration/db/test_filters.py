"""Test which metadata a filter matches, as Postgres evaluates it, and that an index finds it."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg.types.json import Jsonb

from belay_server.db.assistants import SQL as ASSISTANTS
from belay_server.db.crons import SQL as CRONS
from belay_server.db.postgres.connection import restricted
from belay_server.db.postgres.statements import fetch_dicts, fetch_value
from belay_server.db.threads import SQL as THREADS
from belay_server.domain.access import Access, necessary_path

MINE = {"owner": "me", "readers": ["me", "you"], "level": 3, "deep": {"a": 1}, "null": None}

PASSES = [
    {},
    {"owner": "me"},
    {"owner": {"$eq": "me"}},
    {"owner": "me", "level": 3},
    {"level": 3.0},
    {"deep": {"$eq": {"a": 1}}},
    {"readers": {"$contains": "me"}},
    {"readers": {"$contains": ["you", "me"]}},
    {"readers": {"$contains": []}},
    {"readers": ["me", "you"]},
    {"null": None},
    {"$or": [{"owner": "you"}, {"owner": "me"}]},
    {"$and": [{"owner": "me"}, {"level": 3}]},
    {"$and": []},
    {"$or": [{"$and": [{"owner": "me"}, {"level": 4}]}, {"readers": {"$contains": "you"}}]},
]
REFUSES = [
    {"owner": "you"},
    {"owner": "m"},
    {"owner": {"$eq": "you"}},
    {"owner": None},
    {"missing": "me"},
    {"missing": {"$eq": "me"}},
    {"missing": {"$contains": "me"}},
    {"owner": "me", "level": 4},
    {"owner": {"$contains": "me"}},
    {"readers": {"$contains": "him"}},
    {"readers": {"$contains": ["me", "him"]}},
    {"readers": "me"},
    {"deep": {"$contains": "a"}},
    {"$or": []},
    {"$or": [{"owner": "you"}]},
    {"$or": {"owner": "me"}},
    {"$and": [{"owner": "me"}, {"owner": "you"}]},
    {"$and": "me"},
    # Unknown operators match nothing.
    {"owner": {}},
    {"owner": {"$ne": "you"}},
    {"owner": {"$eq": "me", "$ne": "you"}},
    {"deep": {"a": 1}},
    {"$not": {"owner": "you"}},
    ["me"],
    "me",
]


def allows(conn, filter_, metadata) -> bool:
    params = {"filter": Jsonb(filter_), "metadata": Jsonb(metadata)}
    return fetch_value(conn, "SELECT belay_allows(%(filter)s, %(metadata)s)", params)


@pytest.mark.parametrize("filter_", PASSES, ids=str)
def test_the_filter_matches(conn, filter_):
    assert allows(conn, filter_, MINE) is True


@pytest.mark.parametrize("filter_", REFUSES, ids=str)
def test_the_filter_does_not_match(conn, filter_):
    assert allows(conn, filter_, MINE) is False


def test_elements_of_a_list_are_compared_whole(conn):
    listed = {"readers": [{"id": "me", "admin": True}]}
    assert allows(conn, {"readers": {"$contains": {"id": "me"}}}, listed) is False
    assert allows(conn, {"readers": {"$contains": {"id": "me", "admin": True}}}, listed) is True


def test_without_a_filter_everything_matches(conn):
    sql = "SELECT belay_allows(NULL, %(metadata)s)"
    assert fetch_value(conn, sql, {"metadata": Jsonb({})}) is True


# --- the weaker condition, which has an index -----------------------------------------------------


def is_within(conn, filter_, metadata) -> bool:
    path = necessary_path(filter_)
    if path is None:
        return True
    params = {"path": path, "metadata": Jsonb(metadata)}
    return fetch_value(conn, "SELECT coalesce(%(metadata)s @@ %(path)s::jsonpath, false)", params)


@pytest.mark.parametrize("filter_", PASSES, ids=str)
def test_what_a_filter_matches_is_within_its_path(conn, filter_):
    assert is_within(conn, filter_, MINE)


@pytest.mark.parametrize(
    "filter_",
    [
        {"owner": "you"},
        {"owner": {"$eq": "you"}},
        {"readers": {"$contains": "him"}},
        {"$or": [{"owner": "you"}, {"readers": {"$contains": "him"}}]},
        {"$and": [{"owner": "me"}, {"level": 4}]},
    ],
    ids=str,
)
def test_the_usual_filters_of_other_owners_are_not_within_it(conn, filter_):
    assert not is_within(conn, filter_, MINE)


_NAMES = st.sampled_from(["a", "b", 'q"', "$x", "", "é", "\\", "a.b"])
_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 2),
    st.sampled_from([0.5, 1.0, 1e300]),
    st.sampled_from(["", "x", 'q"', "\\", "\n", "é", "😀", "1"]),
)
_VALUES = st.one_of(
    _SCALARS,
    st.lists(_SCALARS, max_size=3),
    st.dictionaries(_NAMES, _SCALARS, max_size=2),
    st.lists(st.dictionaries(_NAMES, _SCALARS, max_size=1), max_size=2),
)
_FIELDS = st.dictionaries(
    _NAMES,
    st.one_of(
        _VALUES,
        st.fixed_dictionaries({}, optional={"$eq": _VALUES, "$contains": _VALUES}),
    ),
    max_size=2,
)
_FILTERS = st.recursive(
    _FIELDS,
    lambda inner: st.dictionaries(
        st.sampled_from(["$or", "$and"]), st.lists(inner, max_size=3), min_size=1, max_size=2
    ),
    max_leaves=4,
)


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(filter_=_FILTERS, metadata=st.dictionaries(_NAMES, _VALUES, max_size=4))
def test_whatever_a_filter_matches_is_within_its_path(conn, filter_, metadata):
    if allows(conn, filter_, metadata):
        assert is_within(conn, filter_, metadata), necessary_path(filter_)


SEARCHES = {
    "threads": (THREADS.search_threads, THREADS.count_threads, "thread_metadata"),
    "assistants": (ASSISTANTS.search_assistants, ASSISTANTS.count_assistants, "assistant_metadata"),
    "crons": (CRONS.search_crons, CRONS.count_crons, "cron_metadata"),
}
#: Rows of 5,000 other callers.
_SERIES = "jsonb_build_object('owner', 'o' || n) FROM generate_series(1, 5000) n"
OTHERS = (
    f"INSERT INTO thread (thread_id, metadata) SELECT gen_random_uuid(), {_SERIES}",
    f"""INSERT INTO assistant (assistant_id, graph_id, name, metadata)
        SELECT gen_random_uuid(), 'g', '', {_SERIES}""",
    f"""INSERT INTO cron (cron_id, on_run_completed, schedule, payload, assistant_id, metadata)
        SELECT gen_random_uuid(), 'keep', '* * * * *', '{{}}',
            (SELECT assistant_id FROM assistant LIMIT 1), {_SERIES}""",
)
ANALYZE = ("ANALYZE thread", "ANALYZE assistant", "ANALYZE cron")
#: Make the plans independent of the pages that other tests have left in the tables, and of what
#: autovacuum has found out meanwhile.
EMPTY = (
    "TRUNCATE thread, assistant, cron CASCADE",
    "DELETE FROM pg_statistic WHERE starelid IN "
    "('thread'::regclass, 'assistant'::regclass, 'cron'::regclass)",
    "UPDATE pg_class SET reltuples = -1, relpages = 0 "
    "WHERE oid IN ('thread'::regclass, 'assistant'::regclass, 'cron'::regclass)",
)
NOTHING_ELSE = dict.fromkeys(
    ("ids", "values", "status", "graph_id", "name", "assistant_id", "thread_id", "enabled")
)


@pytest.mark.parametrize("kind", SEARCHES)
@pytest.mark.parametrize("is_analyzed", [True, False], ids=["analyzed", "fresh"])
@pytest.mark.parametrize(
    "mine",
    [{"owner": "me"}, {"$or": [{"owner": "me"}, {"readers": {"$contains": "me"}}]}],
    ids=["owner", "readers"],
)
def test_a_search_reads_the_metadata_of_its_caller_alone(conn, kind, mine, is_analyzed):
    """It once read those of all callers: one with many large ones slowed down everybody."""
    mine_alone = Access(**{kind: mine})
    search, count, index = SEARCHES[kind]
    params = {**NOTHING_ELSE, "metadata": Jsonb({})}
    page = {"with_values": False, "limit": 10, "offset": 0}
    with conn.transaction(force_rollback=True):
        for statement in (*EMPTY, *OTHERS, *(ANALYZE if is_analyzed else ())):
            conn.execute(statement)
        with restricted(conn, mine_alone):
            for sql in (search.format(sort_by="created_at", sort_order="desc"), count):
                rows = fetch_dicts(conn, f"EXPLAIN {sql}", params | page)
                plan = "\n".join(row["QUERY PLAN"] for row in rows)
                assert f"Bitmap Index Scan on {index}" in plan, plan
