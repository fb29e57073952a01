"""Mark the tests that are not part of the quick suite (`make test`)."""

from __future__ import annotations

from functools import partial

import pytest

#: A parameter set that `make test-all` runs: a further case of what `make test` covers once.
long_case = partial(pytest.param, marks=pytest.mark.long)
#: A parameter set that only `make test-full` runs.
full_case = partial(pytest.param, marks=pytest.mark.full)
