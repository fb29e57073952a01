"""Stream runs, threads and agent runs to clients: events become bytes for a connection."""
