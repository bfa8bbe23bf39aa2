"""`memsvc reconcile|backup|restore`: keeping a data folder whole."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from memsvc.auth import load_server_key
from memsvc.backup import Outcome, back_up, begun, restore
from memsvc.cli.exits import ExitCode
from memsvc.cli.local import (
    ConfigOption,
    LocalFailedError,
    SetOption,
    configured,
    local_failures,
)
from memsvc.cli.output import size
from memsvc.cli.session import Session, command
from memsvc.config import Config
from memsvc.mending import Mended, mend
from memsvc.reapply import Deletion, Reapplied, keep, read_deletions, reapply
from memsvc.receipts import SEED_PURPOSE, ReceiptError, public_key
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
    receipts: Annotated[
        Path | None,
        typer.Option(help="Folder with receipts of deletions, kept since the backup."),
    ] = None,
    config: ConfigOption = None,
    settings: SetOption = None,
) -> None:
    """Makes a new data folder of a backup, and verifies it.

    Give the root key by its setting, or put it into the new folder first. With
    database_url, the catalog goes into that database, which must be empty. What was
    deleted after the backup is in it again; with its receipts it is deleted again.
    Ends with 13 when something is damaged, or a receipt could not be followed.
    """
    loaded = configured(session, config, settings)
    deletions = _deletions(source, receipts) if receipts is not None else []
    _report(session, "Restored to", lambda: restore(loaded, source))
    if receipts is None:
        session.output.note(
            "What was deleted after the backup was begun is there again (--receipts deletes it)."
        )
        return
    with local_failures():
        keep(deletions, loaded.folder.receipts)
        done = asyncio.run(_reapply(loaded, deletions))
    session.output.result(
        {"reapplied": done},
        f"Deleted again: {done.tenants} tenants, {done.memories} memories, {done.documents} "
        f"documents, of {done.receipts} receipts.",
    )
    if done.left:
        session.output.note(
            "Too many documents to be named one by one, delete them yourself: "
            + ", ".join(done.left)
        )
        raise typer.Exit(ExitCode.FINDINGS)


def _deletions(source: Path, receipts: Path) -> list[Deletion]:
    """Read before anything is restored: a receipt that is none ends it."""
    with local_failures():
        began_us = begun(source)
        key = load_server_key(source / "server.key")
    try:
        return read_deletions(receipts, public_key(key.derive(SEED_PURPOSE)), began_us)
    except ReceiptError as error:
        raise LocalFailedError(str(error)) from error


async def _reapply(config: Config, deletions: list[Deletion]) -> Reapplied:
    async with open_application(config) as application:
        return await reapply(application, deletions)


def _report(session: Session, done: str, work: Callable[[], Outcome]) -> None:
    with local_failures():
        outcome = work()
    session.output.result(
        outcome, f"{done} {outcome.path}: {outcome.files} files, {size(outcome.file_bytes)}."
    )
    if outcome.damage:
        session.output.note("\n".join(("Damaged in it:", *outcome.damage)))
        raise typer.Exit(ExitCode.FINDINGS)
