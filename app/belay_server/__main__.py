"""`python -m belay_server` is `belay`."""

from belay_server.cli import main

main()
