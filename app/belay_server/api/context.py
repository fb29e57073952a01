"""How a view gets at the parts its application was made with."""

from __future__ import annotations

from flask import current_app, request

from belay_server.api.security.origins import Origins
from belay_server.services.parts import Parts

PARTS = "belay"
ORIGINS = "belay.origins"
#: Where in a request's environment its own parts are, if they are not those of all.
OWN_PARTS = "belay.parts"


def origins() -> Origins:
    found: Origins = current_app.extensions[ORIGINS]
    return found


def parts() -> Parts:
    found: Parts = request.environ.get(OWN_PARTS) or current_app.extensions[PARTS]
    return found
