"""Mark the tests that are not part of the quick suite (`make test`)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
from _pytest.mark import ParameterSet

#: A parameter set that `make test-all` runs: a further case of what `make test` covers once.
long_case = partial(pytest.param, marks=pytest.mark.long)
#: A parameter set that only `make test-full` runs.
full_case = partial(pytest.param, marks=pytest.mark.full)


def in_turn(values: Sequence[Any], variants: Sequence[Any]) -> list[ParameterSet]:
    """Return each pair of a value and a variant. `make test` runs each value with one variant, the
    variants in turn; `make test-all` runs the other pairs."""
    pairs = [
        (value, variant, position == number % len(variants))
        for number, value in enumerate(values)
        for position, variant in enumerate(variants)
    ]
    return [
        pytest.param(value, variant) if is_turn else long_case(value, variant)
        for value, variant, is_turn in pairs
    ]
