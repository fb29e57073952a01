"""`make test-js`: install the JavaScript SDKs, start a live server and run their tests on it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.servers import LiveServer

HERE = Path(__file__).parent


def main() -> int:
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        print("The JavaScript suite needs Node 20 and npm, which are not here: not run.")
        return 0 if "--if-there" in sys.argv else 1
    subprocess.run([npm, "ci", "--no-audit", "--no-fund", "--silent"], cwd=HERE, check=True)
    with tempfile.TemporaryDirectory(prefix="belay-js-", dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o755)
        server = LiveServer(folder / "data", BELAY_HEARTBEAT_SECONDS="1").start()
        try:
            environ = {**os.environ, "BELAY_URL": server.url}
            command = [npm, "test", "--silent"]
            return subprocess.run(command, cwd=HERE, env=environ, check=False).returncode
        finally:
            server.stop()


if __name__ == "__main__":
    sys.exit(main())
