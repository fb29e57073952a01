"""Find out why the output of an Agent run does not match its schema.

`python -m` of this module is the process that locates the mismatch: it reads the schema and the
output as JSON, and writes the run's error. Its memory and its time are limited, as those that the
library needs grow exponentially with some schemas.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from typing import Any

from belay_server.configuration.command_lines import mismatch_command
from belay_server.domain.agent_runs.output_schemas import explain, is_match, unexplained

_SECONDS = 5
_BYTES = 512 * 1024 * 1024


def output_mismatch(schema: dict[str, Any], value: Any) -> dict[str, str] | None:
    """Return the first mismatch of an output as its run's error, without its place if it cannot be
    located within the limits. Return None if the output is valid."""
    if is_match(schema, value):
        return None
    try:
        located = subprocess.run(  # noqa: S603  (our own)
            mismatch_command(),
            input=json.dumps([schema, value]).encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # where it has aborted for want of memory
            timeout=_SECONDS,
            check=True,
        )
        error: dict[str, str] = json.loads(located.stdout)
    except (subprocess.SubprocessError, json.JSONDecodeError):
        return unexplained()
    return error


def main() -> None:
    """Locate the mismatch of the schema and the output on standard input."""
    schema, value = json.load(sys.stdin.buffer)
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (_BYTES, hard))
    json.dump(explain(schema, value), sys.stdout)


if __name__ == "__main__":
    main()
