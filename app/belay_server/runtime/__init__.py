"""What any process of Belay needs, whatever it serves: logs, turns, garbage collection."""
