"""`make test-js`: install the JavaScript clients, start two live servers and run their tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from tests.model_server import model_server
from tests.servers import LiveServer

HERE = Path(__file__).parent
#: The folders with a package.json: the SDKs, and clients that need another version of theirs.
PACKAGES = (HERE, HERE / "ui")
#: The project of the server that user interfaces chat with.
AGENT = HERE.parent / "projects" / "react" / "langgraph.json"


def main() -> int:
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        print("The JavaScript suite needs Node 20 and npm, which are not here: not run.")
        return 0 if "--if-there" in sys.argv else 1
    for package in PACKAGES:
        command = [npm, "ci", "--no-audit", "--no-fund", "--silent"]
        subprocess.run(command, cwd=package, check=True)
    with ExitStack() as stack:
        name = stack.enter_context(tempfile.TemporaryDirectory(prefix="belay-js-", dir="/tmp"))
        folder = Path(name)
        folder.chmod(0o755)
        model = stack.enter_context(model_server())
        sdk = LiveServer(folder / "sdk", BELAY_HEARTBEAT_SECONDS="1")
        agent = LiveServer(
            folder / "agent", config=AGENT, BELAY_HEARTBEAT_SECONDS="1", **model.environ
        )
        for server in (sdk, agent):
            stack.callback(server.stop)
            server.start()
        urls = {
            "BELAY_URL": sdk.url,
            "BELAY_AGENT_URL": agent.url,
            "BELAY_MODEL_URL": model.url,
        }
        codes = [
            subprocess.run(
                [npm, "test", "--silent"], cwd=package, env={**os.environ, **urls}, check=False
            ).returncode
            for package in PACKAGES
        ]
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
