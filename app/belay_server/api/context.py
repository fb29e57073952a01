"""Give views access to their application's components."""

from __future__ import annotations

from flask import current_app, request

from belay_server.api.security.origins import Origins
from belay_server.services.parts import Parts

PARTS = "belay"
ORIGINS = "belay.origins"
#: The key in a request's environment of the request's own parts, if it has any.
OWN_PARTS = "belay.parts"


def origins() -> Origins:
    """Return the rules for origins."""
    found: Origins = current_app.extensions[ORIGINS]
    return found


def parts() -> Parts:
    """Return the components for the current request."""
    found: Parts = request.environ.get(OWN_PARTS) or current_app.extensions[PARTS]
    return found
