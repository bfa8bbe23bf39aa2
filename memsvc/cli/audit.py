"""`memsvc audit verify`: whether the audit trail is as it was written."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from typing import Annotated

import typer

from memsvc.audit import audit_key
from memsvc.audit_check import Trail, contains, verify_trails
from memsvc.auth import load_server_key
from memsvc.cli.exits import ExitCode
from memsvc.cli.local import ConfigOption, SetOption, configured, local_failures
from memsvc.cli.session import Session, command
from memsvc.config import Config
from storage.catalog import Catalog

audit_group = typer.Typer(help="The audit trail on this machine.", no_args_is_help=True)

_HEAD = re.compile(r"([0-9a-f]{32})=([1-9][0-9]*):([0-9a-f]{64})")


@dataclass(frozen=True)
class _Head:
    tenant_uid: str
    sequence: int
    digest: str


@command(audit_group, "verify", local=True)
def verify(
    session: Session,
    *,
    heads: Annotated[
        list[str] | None,
        typer.Option(
            "--head",
            metavar="TENANT=ENTRY:DIGEST",
            help="A head noted before, to be found again.",
        ),
    ] = None,
    config: ConfigOption = None,
    settings: SetOption = None,
) -> None:
    """Verifies every tenant's audit trail and prints its head. Changes nothing.

    Note the heads somewhere else and give them back later: a trail whose newest
    entries were cut off shows no other way. Ends with 13 when a trail was altered.
    """
    wanted = [_parsed(head) for head in heads or ()]
    loaded = configured(session, config, settings)
    with local_failures():
        trails, missing = asyncio.run(_verified(loaded, wanted))
    for trail in trails:
        text = trail.problem or f"{trail.entries}:{trail.head}"
        session.output.result(trail, f"{trail.tenant_uid}={text}")
    for head in missing:
        problem = f"entry {head.sequence} is not the one that was noted"
        session.output.result({"missing": head}, f"{head.tenant_uid}={problem}")
    if missing or any(trail.problem for trail in trails):
        raise typer.Exit(ExitCode.FINDINGS)


def _parsed(text: str) -> _Head:
    match = _HEAD.fullmatch(text)
    if match is None:
        raise typer.BadParameter("not TENANT=ENTRY:DIGEST as printed", param_hint="--head")
    return _Head(match[1], int(match[2]), match[3])


async def _verified(config: Config, wanted: list[_Head]) -> tuple[list[Trail], list[_Head]]:
    key = audit_key(load_server_key(config.folder.server_key))
    catalog = await Catalog.open(config.catalog_url)
    try:
        trails = [trail async for trail in verify_trails(catalog, key)]
        missing = [
            head
            for head in wanted
            if not await contains(catalog, head.tenant_uid, head.sequence, head.digest)
        ]
        return trails, missing
    finally:
        await catalog.close()
