"""Settings from the environment, and what follows from them before a process starts."""
