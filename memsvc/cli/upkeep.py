"""`memsvc reconcile`: mending a data folder that no server holds."""

from __future__ import annotations

import asyncio

import typer

from memsvc.cli.exits import ExitCode
from memsvc.cli.local import ConfigOption, SetOption, configured, local_failures
from memsvc.cli.session import Session, command
from memsvc.config import Config
from memsvc.mending import Mended, mend
from memsvc.reconcile import Report, reconcile
from memsvc.server import open_application


def register(app: typer.Typer) -> None:
    """Adds the commands of this module to the root."""
    command(app, "reconcile", local=True)(_reconcile)


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
