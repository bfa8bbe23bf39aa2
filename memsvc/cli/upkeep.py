"""`memsvc reconcile|backup|restore`: keeping a data folder whole."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from memsvc.backup import Outcome, back_up, restore
from memsvc.cli.exits import ExitCode
from memsvc.cli.local import ConfigOption, SetOption, configured, local_failures
from memsvc.cli.output import size
from memsvc.cli.session import Session, command
from memsvc.config import Config
from memsvc.mending import Mended, mend
from memsvc.reconcile import Report, reconcile
from memsvc.server import open_application


def register(app: typer.Typer) -> None:
    """Adds the commands of this module to the root."""
    command(app, "reconcile", local=True)(_reconcile)
    command(app, "backup", local=True)(_backup)
    command(app, "restore", local=True)(_restore)


def _reconcile(session: Session, config: ConfigOption = None, settings: SetOption = None) -> None:
    """Finishes what a crash left, verifies every record, and mends from text what is damaged.

    Stop the server first. Damaged blocks are encoded again by the next `memsvc serve`.
    Ends with 13 when texts are damaged or lost: restore them from a backup.
    """
    loaded = configured(session, config, settings)
    with local_failures():
        report, mended = asyncio.run(_mend(loaded))
    lost = mended.lost or bool(report.lost_documents or report.damaged_stores)
    session.output.result(
        {"reconciled": report, "mended": mended},
        f"{mended.blocks} blocks are to be encoded again."
        if mended.blocks
        else "No block was damaged.",
    )
    if not session.output.as_json:
        for line in _losses(report, mended):
            session.output.text(line)
    if lost:
        raise typer.Exit(ExitCode.FINDINGS)


async def _mend(config: Config) -> tuple[Report, Mended]:
    async with open_application(config) as application:
        return await reconcile(application), await mend(application)


def _losses(report: Report, mended: Mended) -> list[str]:
    lines = [f"damaged store of tenant {uid}: restore a backup" for uid in mended.damaged_stores]
    for what, lost in (("damaged", mended.damaged_texts), ("lost", report.lost_documents)):
        lines += [f"{what} texts of memory {uid}: {numbers}" for uid, numbers in lost.items()]
    return lines + [f"not mended: {finding}" for finding in mended.unmended]


def _backup(
    session: Session,
    target: Annotated[Path, typer.Argument(help="Folder to be made.")],
    config: ConfigOption = None,
    settings: SetOption = None,
) -> None:
    """Copies everything durable, of one moment, into a new folder, and verifies the copy.

    May run beside a server. The root key is not copied: keep it elsewhere. Ends with 13
    when something in the copy is damaged.
    """
    _report(session, "Backed up to", lambda: back_up(configured(session, config, settings), target))


def _restore(
    session: Session,
    source: Annotated[Path, typer.Argument(help="Folder that `memsvc backup` made.")],
    config: ConfigOption = None,
    settings: SetOption = None,
) -> None:
    """Makes a new data folder of a backup, and verifies it.

    Give the root key by its setting, or put it into the new folder first. With
    database_url, the catalog goes into that database, which must be empty.
    """
    _report(session, "Restored to", lambda: restore(configured(session, config, settings), source))


def _report(session: Session, done: str, work: Callable[[], Outcome]) -> None:
    with local_failures():
        outcome = work()
    session.output.result(
        outcome, f"{done} {outcome.path}: {outcome.files} files, {size(outcome.file_bytes)}."
    )
    if outcome.damage:
        session.output.note("\n".join(("Damaged in it:", *outcome.damage)))
        raise typer.Exit(ExitCode.FINDINGS)
