"""What a client sends much of costs others nothing: it is refused early, or handled in turns."""

from __future__ import annotations

import marshmallow as ma
import pytest

from app.api.fields import List
from app.services.output_schemas import OutputSchemaChecks


class Counted(ma.fields.String):
    seen = 0

    def _deserialize(self, *args, **kwargs):
        self.seen += 1
        return super()._deserialize(*args, **kwargs)


def test_what_is_too_long_is_not_looked_into():
    element = Counted()
    field = List(element, validate=ma.validate.Length(max=2))
    with pytest.raises(ma.ValidationError, match="Longer than maximum length 2"):
        field.deserialize(["a"] * 3)
    assert element.seen == 0
    assert field.deserialize(["a"] * 2) == ["a", "a"]


def test_others_have_their_turn_between_the_steps_of_a_schemas_check(monkeypatch):
    turns = []
    monkeypatch.setattr("app.services.output_schemas.time.sleep", turns.append)
    schema = {"properties": {f"p{n}": {"pattern": f"^{n}$"} for n in range(10)}}
    OutputSchemaChecks().check(schema)
    assert turns == [0] * 11
