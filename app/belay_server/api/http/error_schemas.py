"""The schema of error responses."""

from __future__ import annotations

import marshmallow as ma


class Error(ma.Schema):
    """An error response: `detail` describes the error."""

    detail = ma.fields.String(required=True)
