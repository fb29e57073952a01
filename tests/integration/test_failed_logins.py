"""Failed authentications are limited by address, and nobody else's."""

from __future__ import annotations

import uuid

from belay_server.bus.rate_limits import FailedLogins


def test_an_address_that_fails_often_has_to_wait(valkey_url):
    prefix = f"{uuid.uuid4().hex}:"
    logins = FailedLogins(valkey_url, prefix, ["5/day", "100000/day"])
    assert [logins.seconds_to_wait("10.0.0.1") for _ in range(5)] == [0.0] * 5
    assert 0 < logins.seconds_to_wait("10.0.0.1") <= 86_400
    assert logins.seconds_to_wait("10.0.0.2") == 0.0
    # Counted over all web processes.
    assert FailedLogins(valkey_url, prefix, ["5/day"]).seconds_to_wait("10.0.0.1") > 0


def test_a_client_with_a_wrong_key_stays_below_the_limits(valkey_url):
    logins = FailedLogins(valkey_url, f"{uuid.uuid4().hex}:")
    assert not any(logins.seconds_to_wait("10.0.0.1") for _ in range(200))
