"""`belay dev` and `belay migrate`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from app.settings import Settings, SettingsError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="belay")
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
    help="Where the embedded Postgres and Valkey keep their data.",
)
@click.option("--concurrency", type=click.IntRange(1, 1000), help="Runs at once. [default: 16]")
def dev(config: Path | None, host: str, port: int, data_dir: Path, concurrency: int | None) -> None:
    """Run API, worker, Postgres and Valkey on this machine, until Ctrl-C."""
    from app.dev.embedded import EmbeddedUnavailable  # noqa: PLC0415
    from app.dev.server import DevOptions, PortBusy, StartFailed, run_dev  # noqa: PLC0415

    try:
        run_dev(DevOptions(config, host, port, data_dir, concurrency), os.environ)
    except (PortBusy, SettingsError, EmbeddedUnavailable, StartFailed) as error:
        click.echo(f"belay dev: {error}", err=True)
        sys.exit(2)


@main.command()
def migrate() -> None:
    """Bring the database's schema up to this version (the release process)."""
    import psycopg  # noqa: PLC0415

    from app.db.migrate import VectorsUnavailable  # noqa: PLC0415
    from app.db.migrate import migrate as apply_migrations  # noqa: PLC0415
    from app.graphs.project import read_project  # noqa: PLC0415
    from app.graphs.project_files import ProjectError  # noqa: PLC0415

    try:
        settings = Settings.from_environ({"REDIS_URL": "redis://unused", **os.environ})
        index = read_project(settings.config_path).store.index
        applied = apply_migrations(settings.database_url, store_index=index)
    except (SettingsError, ProjectError, VectorsUnavailable, psycopg.Error) as error:
        click.echo(f"belay migrate: {error}", err=True)
        sys.exit(1)
    for name in applied:
        click.echo(f"applied {name}")
    click.echo("the schema is up to date")


if __name__ == "__main__":
    main()
