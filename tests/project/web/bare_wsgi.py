"""A minimal WSGI app, which responds to every path."""

from __future__ import annotations


def app(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    if environ["PATH_INFO"] == "/who":
        return [environ.get("REMOTE_USER", "").encode()]
    return [f"the project at {environ['PATH_INFO']}".encode()]
