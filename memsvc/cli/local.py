"""`memsvc init|serve|worker|migrate|check`: what happens where the data folder is."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from memsvc.auth import ServerKeyError
from memsvc.backup import BackupError
from memsvc.check import Severity, check_data
from memsvc.cli.exits import ExitCode
from memsvc.cli.output import Output
from memsvc.cli.session import ADDRESS_FILE, KEY_FILE, Session, command
from memsvc.client import ConfigurationError, MemsvcError
from memsvc.config import Config
from memsvc.logs import configure_logging
from memsvc.server import ServerStartError, run
from memsvc.setup import DataFolderError, initialise
from storage import failpoints
from storage.catalog import CatalogError, current_revision, migrate
from storage.crypto import RootKeyError
from storage.store import StorageError

ConfigOption = Annotated[Path | None, typer.Option("--config", help="TOML file of settings.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Any setting of docs/configuration.md."),
]


class LocalFailedError(MemsvcError):
    """The data folder or the catalog does not allow the command."""


@contextmanager
def local_failures() -> Iterator[None]:
    """What is wrong on this machine, as an error that ends with its exit code."""
    try:
        yield
    except (DataFolderError, RootKeyError, ServerKeyError, ServerStartError) as error:
        raise ConfigurationError(str(error)) from error
    except (BackupError, CatalogError, StorageError, OSError) as error:
        raise LocalFailedError(str(error)) from error


def _settings(pairs: list[str] | None) -> dict[str, str]:
    names = {setting.name for setting in dataclasses.fields(Config)}
    settings: dict[str, str] = {}
    for pair in pairs or ():
        name, equals, value = pair.partition("=")
        if not equals or name not in names:
            raise typer.BadParameter(f"{pair!r} is no NAME=VALUE of a setting", param_hint="--set")
        settings[name] = value
    return settings


def configured(
    session: Session, file: Path | None, pairs: list[str] | None, **options: object
) -> Config:
    """This process's settings, from options, --set, environment and file. Arms a failpoint."""
    given = {name: value for name, value in options.items() if value is not None}
    loaded = session.config(file, **{**_settings(pairs), **given})
    if loaded.failpoint:
        failpoints.arm(failpoints.die_at(*failpoints.parse(loaded.failpoint)))
    return loaded


def register(app: typer.Typer) -> None:
    """Adds the commands of this module to the root."""
    command(app, "init", local=True)(_init)
    command(app, "serve", local=True)(_serve)
    command(
        app,
        "worker",
        local=True,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )(_worker)
    command(app, "migrate", local=True)(_migrate)
    command(app, "check", local=True)(_check)


def _init(session: Session, config: ConfigOption = None, settings: SetOption = None) -> None:
    """Makes a data folder and prints the operator's API key.

    The key is kept in the folder too, readable by its owner only, so that
    commands on this machine find it. Run again it changes nothing.
    """
    loaded = configured(session, config, settings)
    with local_failures():
        made = initialise(loaded)
        if made.credential is not None:
            _keep_private(session.folder / KEY_FILE, made.credential)
    output = session.output
    if made.credential is None:
        output.result(
            {"data": session.folder, "tenant": made.tenant_id, "api_key": None},
            f"{session.folder} has been set up before; nothing was changed.",
        )
        return
    output.note(f"Set up {session.folder}. The operator's API key, also kept in {KEY_FILE} there:")
    output.result(
        {"data": session.folder, "tenant": made.tenant_id, "api_key": made.credential},
        made.credential,
    )


def _keep_private(path: Path, text: str) -> None:
    staged = path.with_name(f".{path.name}.new")
    staged.unlink(missing_ok=True)
    handle = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(text + "\n")
    staged.replace(path)


def _serve(
    session: Session,
    *,
    listen: Annotated[str | None, typer.Option(help="host:port or unix:PATH; port 0: any.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Model of the supervised worker: default, fake or a path.")
    ] = None,
    worker_address: Annotated[
        str | None, typer.Option(help="A worker that runs apart; none is started then.")
    ] = None,
    config: ConfigOption = None,
    settings: SetOption = None,
) -> None:
    """Serves until SIGTERM, then finishes the calls that are running.

    With --json one line on stdout says when it serves and where.
    """
    options: dict[str, object] = {
        "listen": listen,
        "worker_model": model,
        "worker_address": worker_address,
    }
    loaded = configured(session, config, settings, **options)
    if loaded.wipe_freed_memory:
        _restart_wiping(session)
    configure_logging(loaded.log_level, loaded.log_format)
    address_file = session.folder / ADDRESS_FILE

    def on_serving(address: str) -> None:
        _keep_private(address_file, address)
        session.output.result({"serving": address, "pid": os.getpid()}, f"Serving on {address}")
        sys.stdout.flush()

    with local_failures():
        try:
            asyncio.run(run(loaded, on_serving))
        finally:
            address_file.unlink(missing_ok=True)


#: Read by the C library and by Python when a process begins, and by the processes it starts:
#: every free goes to the C library at once, which puts 0xff in the place of what was there.
_WIPING = {
    "PYTHONMALLOC": "malloc",
    "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0:glibc.malloc.perturb=255",
}


def _restart_wiping(session: Session) -> None:
    """Begins this process anew, once, so that it overwrites memory that it frees."""
    if _WIPING.items() <= session.environment.items():
        return
    os.execve(  # noqa: S606  # this very command again, no shell
        sys.executable,
        [sys.executable, "-m", "memsvc.cli", *sys.argv[1:]],
        {**os.environ, **_WIPING},
    )


def _worker(
    session: Session,
    context: typer.Context,
    model: Annotated[str, typer.Option(help="default, fake or a path.")] = "default",
    listen: Annotated[str, typer.Option(help="host:port or unix:PATH.")] = "127.0.0.1:7461",
) -> None:
    """Becomes a model worker, to be named to `memsvc serve --worker-address`.

    Options not listed here are the worker's own: `python -m model_adapter --help`.
    """
    arguments = ["--data-dir", str(session.folder), "--model", model, "--listen", listen]
    arguments += context.args
    sys.stdout.flush()
    # The model side is a process of its own: this one never loads torch.
    os.execv(  # noqa: S606  # our own module; arguments pass as a list, no shell
        sys.executable, [sys.executable, "-m", "model_adapter", *arguments]
    )


def _migrate(session: Session, config: ConfigOption = None, settings: SetOption = None) -> None:
    """Brings the catalog's schema up to this version. Up to date is no error."""
    loaded = configured(session, config, settings)
    with local_failures():
        if not loaded.database_url and not session.folder.is_dir():
            raise DataFolderError(f"{session.folder} is no data folder; run `memsvc init`")
        before = current_revision(loaded.catalog_url)
        migrate(loaded.catalog_url)
        after = current_revision(loaded.catalog_url)
    changed = before != after
    session.output.result(
        {"before": before, "after": after, "changed": changed},
        f"Migrated from {before or 'nothing'} to {after}." if changed else f"Already at {after}.",
    )


def _check(session: Session, config: ConfigOption = None, settings: SetOption = None) -> None:
    """Verifies every stored record, and the catalog against them. Changes nothing.

    May run beside a server. Ends with 13 when something is damaged.
    """
    loaded = configured(session, config, settings)
    with local_failures():
        damaged, leftovers = asyncio.run(_report(loaded, session.output))
    session.output.result(
        {"damage": damaged, "leftovers": leftovers},
        f"{damaged} damaged, {leftovers} left over from a crash."
        if damaged or leftovers
        else "Everything is sound.",
    )
    if damaged:
        raise typer.Exit(ExitCode.FINDINGS)


async def _report(config: Config, output: Output) -> tuple[int, int]:
    """Prints findings as they come; how many of each severity."""
    damaged = leftovers = 0
    if not config.folder.root.is_dir():
        raise DataFolderError(f"{config.folder.root} is no data folder; run `memsvc init`")
    with output.progress("Checking", None):
        async for finding in check_data(config):
            damaged += finding.severity is Severity.DAMAGE
            leftovers += finding.severity is Severity.LEFTOVER
            where = " ".join(filter(None, (finding.tenant, finding.memory)))
            if output.as_json:
                output.json({"finding": finding})
            else:
                output.text(f"{finding.severity}: {where}: {finding.problem}: {finding.detail}")
    return damaged, leftovers
