"""RabbitMQ, for tests of a broker that is not Redis. It is Debian's package, also without root."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

from belay_server.dev.process_tree import die_with_parent
from tests.debian_packages import unpacked
from tests.ports import accepts, free_port
from tests.waiting import wait_until

_ERLANG = (
    *("base", "asn1", "crypto", "eldap", "ftp", "inets", "mnesia", "os-mon", "parsetools"),
    *("public-key", "runtime-tools", "snmp", "ssl", "syntax-tools", "tftp", "tools", "xmerl"),
)
_PACKAGES = ("rabbitmq-server", *(f"erlang-{name}" for name in _ERLANG))


class RabbitMissing(Exception):
    """The packages of RabbitMQ cannot be downloaded."""


class RabbitMQ:
    """A server with its data in a folder, and the port mapper of Erlang that it needs."""

    def __init__(self, folder: Path) -> None:
        root = unpacked("rabbitmq", _PACKAGES)
        if root is None:
            raise RabbitMissing("the Debian packages of RabbitMQ cannot be downloaded")
        erlang = root / "usr/lib/erlang"
        self._log = folder / "rabbitmq.log"
        self._processes: list[subprocess.Popen[bytes]] = []
        self._port, mapper, distribution = free_port(), free_port(), free_port()
        self.url = f"amqp://guest:guest@127.0.0.1:{self._port}//"
        [mapper_program] = erlang.glob("erts-*/bin/epmd")
        [server] = root.glob("usr/lib/rabbitmq/lib/*/sbin/rabbitmq-server")
        self._commands = ([str(mapper_program), "-port", str(mapper)], ["sh", str(server)])
        scripts = folder / "bin"
        scripts.mkdir(parents=True)
        script = (erlang / "bin/erl").read_text()
        erl = scripts / "erl"
        erl.write_text(script.replace("ROOTDIR=/usr/lib/erlang", f"ROOTDIR={erlang}"))
        erl.chmod(0o755)
        self._env = {
            "PATH": f"{scripts}:{erlang}/bin:{os.environ['PATH']}",
            "HOME": str(folder),
            "ERL_EPMD_PORT": str(mapper),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": "belay@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self._port),
            "RABBITMQ_DIST_PORT": str(distribution),
            "RABBITMQ_MNESIA_BASE": str(folder / "data"),
            "RABBITMQ_LOG_BASE": str(folder / "log"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "plugins"),
        }

    def start(self) -> None:
        """Start it, and wait until it accepts connections."""
        with self._log.open("ab") as log:
            for command in self._commands:
                self._processes.append(
                    subprocess.Popen(
                        command,
                        env=self._env,
                        stdout=log,
                        stderr=log,
                        start_new_session=True,
                        preexec_fn=die_with_parent(os.getpid(), signal.SIGKILL),
                    )
                )
        wait_until(lambda: accepts(self._port), 120, "RabbitMQ")

    def kill(self) -> None:
        """Kill it. Its data stays for the next start."""
        for process in self._processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            process.wait()
        self._processes.clear()
