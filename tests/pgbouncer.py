"""PgBouncer in transaction mode, in front of a cluster's Postgres.

It is Debian's package: the installed one or, without root, its files in the virtual environment.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

#: The package and the library that a minimal Debian lacks.
_PACKAGES = ("pgbouncer", "libc-ares2")
_SECONDS = 60.0


def find_pgbouncer() -> tuple[str, dict[str, str]] | None:
    """Return the program and the environment variables that it needs. None: there is none, and its
    package cannot be downloaded."""
    if installed := shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin"):
        return installed, {}
    folder = Path(sys.prefix) / "pgbouncer"
    program = folder / "usr" / "sbin" / "pgbouncer"
    if not program.exists() and not _download(folder):
        return None
    [libraries] = (folder / "usr" / "lib").glob("*-linux-*")
    return str(program), {"LD_LIBRARY_PATH": str(libraries)}


def _download(folder: Path) -> bool:
    folder.mkdir(exist_ok=True)
    try:
        for command in (
            ["apt-get", "download", *_PACKAGES],
            ["sh", "-c", 'for package in *.deb; do dpkg-deb -x "$package" . || exit 1; done'],
        ):
            subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return False
    return True


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
