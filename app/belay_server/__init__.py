"""Belay: an Agent Server you can run yourself."""

import os

# Read by LangGraph when it is imported: without it, whoever can write to the database can have any
# Python object made of what a checkpoint holds. The types of a graph's own state are let through.
os.environ.setdefault("LANGGRAPH_STRICT_MSGPACK", "true")
