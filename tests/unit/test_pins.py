"""Test that the installed packages have no known vulnerability and that no unsafe option is on.

The table has the advisories known when it was written. `make audit` checks for newer ones.
"""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

import langgraph.checkpoint.serde._msgpack as msgpack_safety
import pytest
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer

from belay_server.configuration.settings import Settings
from belay_server.doorbell import celery_config
from belay_server.graphs.checkpoints.thread_saver import ThreadSaver

#: Package, first fixed version, advisories.
SAFE_FROM = [
    ("langgraph-checkpoint", "4.0.0", "CVE-2025-64439, CVE-2026-27794"),
    ("langgraph", "1.0.10", "CVE-2026-28277"),
    ("langgraph-sdk", "0.3.15", "CVE-2026-48776"),
    ("langchain-core", "1.2.5", "CVE-2025-68664"),
    ("celery", "5.2.2", "CVE-2021-23727"),
    ("flask", "3.1.3", "CVE-2023-30861, CVE-2026-27205"),
    ("werkzeug", "3.1.6", "CVE-2024-49767"),
    ("flask-cors", "6.0.1", "CVE-2024-6221"),
    ("marshmallow", "4.1.2", "CVE-2025-68480"),
    ("gunicorn", "23.0.0", "CVE-2024-1135, CVE-2024-6827"),
    ("gevent", "23.9.0", "CVE-2023-41419"),
    ("orjson", "3.9.15", "CVE-2024-27454"),
    ("redis", "4.5.5", "CVE-2023-28858, CVE-2023-28859"),
]


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


@pytest.mark.parametrize(("package", "safe", "advisory"), SAFE_FROM)
def test_the_installed_and_locked_versions_are_safe(package, safe, advisory):
    assert _numbers(version(package)) >= _numbers(safe), advisory
    lock = (Path(__file__).parents[2] / "requirements.lock").read_text()
    locked = re.search(rf"^{package}==([0-9.]+)", lock, re.MULTILINE)
    assert locked is not None
    assert _numbers(locked[1]) >= _numbers(safe), advisory


def test_unwanted_packages_are_not_locked():
    lock = (Path(__file__).parents[2] / "requirements.lock").read_text()
    for package in ("langgraph-checkpoint-sqlite", "langgraph-api", "flower"):
        assert re.search(rf"^{package}", lock, re.MULTILINE) is None


def test_checkpoints_deserialise_only_types_of_the_state():
    assert msgpack_safety.STRICT_MSGPACK_ENABLED
    saver = ThreadSaver(None)
    serde = saver.serde
    assert isinstance(serde, JsonPlusSerializer)
    assert serde.pickle_fallback is False
    evil = JsonPlusSerializer(allowed_msgpack_modules=True).dumps_typed(_Evil())
    assert not isinstance(serde.loads_typed(evil), _Evil)
    mine = saver.with_allowlist([(__name__, "_Evil")])
    assert mine is saver
    assert isinstance(saver.serde.loads_typed(evil), _Evil)


class _Evil:
    """A class that a checkpoint could name."""

    def __reduce__(self):
        return (_Evil, ())

    def model_dump(self):
        return {}


def test_celery_accepts_only_json_and_stores_no_results():
    urls = {"DATABASE_URL": "postgresql://x/", "REDIS_URL": "redis://x/"}
    config = celery_config(Settings.from_environ(urls))
    assert config["task_serializer"] == "json"
    assert config["accept_content"] == ["json"]
    assert config.get("result_backend") is None
    assert config["task_ignore_result"] is True
    assert config["worker_enable_remote_control"] is False


def test_pre_commit_has_the_locked_version_of_ruff():
    root = Path(__file__).parents[2]
    locked = re.search(r"^ruff==(\S+)", (root / "requirements.lock").read_text(), re.MULTILINE)
    assert locked is not None
    assert f"rev: v{locked[1]}\n" in (root / ".pre-commit-config.yaml").read_text()
