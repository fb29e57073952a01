"""A package that takes `SLOW_IMPORT` seconds to import, when one of its modules is imported."""

import os
import time

from .part import PART  # noqa: F401

time.sleep(float(os.environ["SLOW_IMPORT"]))
