"""Run the `belay` command: `python -m belay_server`."""

from belay_server.cli.commands import main

main()
