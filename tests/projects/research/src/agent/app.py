"""The built frontend, served beside the API."""

from __future__ import annotations

from pathlib import Path

from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles

_FRONTEND = Path(__file__).parents[2] / "frontend"

app = Starlette(routes=[Mount("/app", StaticFiles(directory=_FRONTEND, html=True), name="app")])
