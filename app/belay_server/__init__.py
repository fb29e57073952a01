"""Belay: an Agent Server you can run yourself."""

import os

# LangGraph reads this at import. Without it, deserializing a checkpoint may create arbitrary Python
# objects, so write access to the database is enough to run code. The types of a graph's own state
# are still allowed.
os.environ.setdefault("LANGGRAPH_STRICT_MSGPACK", "true")
