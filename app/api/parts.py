"""How a view gets at the parts its application was made with."""

from __future__ import annotations

from flask import current_app

from app.services.parts import Parts

PARTS = "belay"


def parts() -> Parts:
    found: Parts = current_app.extensions[PARTS]
    return found
