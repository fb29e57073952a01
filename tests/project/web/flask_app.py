"""A WSGI app for the `http` section of langgraph.json."""

from __future__ import annotations

from flask import Flask, request

app = Flask(__name__)


@app.get("/hello/<name>")
def hello(name):
    return {"name": name, "request_id": request.headers["x-request-id"]}


@app.get("/beats")
def beats():
    return (f"beat {n}\n" for n in range(3)), {"content-type": "text/plain"}


@app.get("/broken")
def broken():
    raise RuntimeError("broken on purpose")
