"""The one shape of every error."""

from __future__ import annotations

import marshmallow as ma


class Error(ma.Schema):
    """What was wrong, in words."""

    detail = ma.fields.String(required=True)
