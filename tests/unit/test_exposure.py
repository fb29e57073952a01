"""Test that a server that other machines can reach is refused without authentication."""

from __future__ import annotations

import pytest

from belay_server.configuration.exposure import is_loopback, refuse_open_server
from belay_server.configuration.settings import SettingsError


@pytest.fixture
def project(tmp_path):
    path = tmp_path / "langgraph.json"
    path.write_text('{"graphs": {"a": "./a.py:a"}}')
    return path


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost", "unix:/tmp/x", "/tmp/x"]
)
def test_a_loopback_address_is_accepted_without_authentication(host, project):
    assert is_loopback(host)
    refuse_open_server([host], {"BELAY_CONFIG": str(project)})


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.168.1.4", "10.0.0.1", "example.com"])
def test_a_public_address_is_refused_unless_authentication_is_configured(host, project):
    assert not is_loopback(host)
    environ = {"BELAY_CONFIG": str(project)}
    with pytest.raises(SettingsError, match="can be reached from other machines"):
        refuse_open_server(["127.0.0.1", host], environ)
    for word in ("keys", "none"):
        refuse_open_server([host], {**environ, "BELAY_AUTH": word})
    project.write_text('{"graphs": {"a": "./a.py:a"}, "auth": {"path": "./auth.py:auth"}}')
    refuse_open_server([host], environ)
