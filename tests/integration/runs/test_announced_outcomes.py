"""Test that the outcome announced with an end is what Postgres returns for its row."""

from __future__ import annotations

import uuid

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from belay_server.db.postgres.connection import connect
from belay_server.db.postgres.statements import fetch_value
from belay_server.db.run_claims import _ending_params
from belay_server.domain.runs import Claim, Ending, RunStatus
from belay_server.graphs.serde import to_plain
from belay_server.services.runs.endings import with_small_answer

_ANSWER = "SELECT belay_answer(%(outcome)s)::text"
_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=True)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def conn(make_database):
    with connect(make_database("outcomes")) as conn:
        yield conn


@settings(deadline=None, max_examples=300, derandomize=True, database=None)
@given(values=_VALUES)
def test_the_announced_outcome_equals_that_of_the_row(conn, values):
    ending = with_small_answer(Ending(RunStatus.SUCCESS, values=to_plain(values)))
    if not ending.answer:
        return
    params = _ending_params(uuid.uuid4(), Claim(uuid.uuid4(), 1), ending)
    stored = fetch_value(conn, _ANSWER, {"outcome": params["outcome"]})
    announced = orjson.loads(ending.answer)
    assert repr(_sorted(announced)) == repr(_sorted(orjson.loads(stored)))


def _sorted(value):
    """Return the value with the keys of objects in order: JSONB has its own."""
    if isinstance(value, dict):
        return {key: _sorted(value[key]) for key in sorted(value)}
    return [_sorted(one) for one in value] if isinstance(value, list) else value
