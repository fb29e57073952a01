"""Test which metadata a filter matches, as Postgres evaluates it."""

from __future__ import annotations

import pytest
from psycopg.types.json import Jsonb

from belay_server.db.connection import fetch_value

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
