"""PgBouncer in transaction mode, in front of a cluster's Postgres.

It is Debian's package: the installed one or, without root, its files in the virtual environment.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from tests.debian_packages import unpacked

#: The package and the library that a minimal Debian lacks.
_PACKAGES = ("pgbouncer", "libc-ares2")


def find_pgbouncer(reachable: Path) -> tuple[str, dict[str, str]] | None:
    """Return the program and the environment variables that it needs. None: there is none, and its
    package cannot be downloaded. `reachable` is a folder that the user of the embedded Postgres can
    read, unlike the virtual environment perhaps."""
    if installed := shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin"):
        return installed, {}
    if (folder := unpacked("pgbouncer", _PACKAGES)) is None:
        return None
    files = reachable / "pgbouncer"
    shutil.copytree(folder / "usr", files, symlinks=True)
    [libraries] = (files / "lib").glob("*-linux-*")
    return str(files / "sbin" / "pgbouncer"), {"LD_LIBRARY_PATH": str(libraries)}


def configuration(port: int, *, socket_folder: str, pool_size: int) -> str:
    """Return the content of a `pgbouncer.ini` for the embedded Postgres."""
    return f"""
[databases]
* = host={socket_folder} user=postgres pool_size={pool_size}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = transaction
max_client_conn = 1000
ignore_startup_parameters = extra_float_digits,options
"""
