"""Test which headers go into a graph's config."""

from __future__ import annotations

import pytest

from belay_server.domain.headers import HeaderPatterns

SENT = {"X-User": "u", "X-Org": "o", "Authorization": "secret", "Cookie": "secret"}


@pytest.mark.parametrize(
    ("document", "names"),
    [
        ({}, set()),
        ({"includes": ["x-user"]}, {"x-user"}),
        ({"includes": ["X-*"]}, {"x-user", "x-org"}),
        ({"includes": ["*"]}, {"x-user", "x-org"}),
        ({"includes": ["*"], "excludes": ["x-o*"]}, {"x-user"}),
        ({"includes": ["authorization"]}, {"authorization"}),
        ({"includes": ["authorization"], "excludes": ["auth*"]}, set()),
        ({"include": ["x-user"], "exclude": []}, {"x-user"}),
    ],
)
def test_patterns_select_the_headers_for_the_graph(document, names):
    assert HeaderPatterns.of(document).pick(SENT).keys() == names


@pytest.mark.parametrize("document", [[], "x", {"includes": "x"}, {"excludes": [1]}])
def test_an_invalid_list_of_header_names_is_refused(document):
    with pytest.raises(ValueError, match="must"):
        HeaderPatterns.of(document)
