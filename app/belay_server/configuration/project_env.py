"""Read `env` of `langgraph.json`, and add it to a process's environment before anything reads it.

So the settings, gunicorn's options and LANGGRAPH_CONFIG may all be there. A variable that the
operator has set keeps its value.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import orjson
from dotenv import dotenv_values

from belay_server.configuration.settings import SettingsError, config_path


def add_project_env(environ: MutableMapping[str, str]) -> None:
    """Add the variables of the project's `env` to the environment.

    Raise SettingsError if `env` is invalid, or BELAY_CONFIG names no file. Other errors in
    `langgraph.json` are reported when the project is read.
    """
    path = config_path(environ)
    try:
        document = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return
    if not isinstance(document, dict):
        return
    try:
        variables = read_env(path.parent, document.get("env", {}))
    except ValueError as error:
        raise SettingsError(f"{path}: {error}") from error
    for name, value in variables.items():
        environ.setdefault(name, value)


def read_env(root: Path, env: Any) -> dict[str, str]:
    """Return the variables of `env`: an object, or the name of a file in the folder `root`.

    A file that does not exist has none: a deployment may set the variables by other means. Raise
    ValueError if it is neither an object nor a name.
    """
    if isinstance(env, str):
        file = root / env
        if not file.is_file():
            return {}
        return {name: value for name, value in dotenv_values(file).items() if value is not None}
    if isinstance(env, dict):
        return {name: _as_text(value) for name, value in env.items() if value is not None}
    raise ValueError("'env' must be a file name or an object")


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else orjson.dumps(value).decode()
