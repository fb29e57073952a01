"""Marks what `make test-all` runs: further cases of what `make test` covers once."""

from __future__ import annotations

from functools import partial

import pytest

#: A parameter set whose test belongs to the long form.
long_case = partial(pytest.param, marks=pytest.mark.long)
