"""`memsvc keys ...`, `memsvc verify-receipt` and `memsvc verify-deletion`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from memsvc.canaries import Hit, Search, processes_of
from memsvc.cli.exits import ExitCode
from memsvc.cli.local import ConfigOption, SetOption, configured, local_failures
from memsvc.cli.session import Session, command
from memsvc.client import ConfigurationError
from memsvc.config import Config
from memsvc.keys import renew_tenants, rewrap, rotate_root
from memsvc.receipts import PUBLIC_KEY_FILE, ReceiptError, read_public_key, verify_receipt
from memsvc.setup import hold

_MAX_SHOWN = 100


def register(app: typer.Typer) -> None:
    """Adds the commands of this module to the root."""
    keys = typer.Typer(help="Keys of what is stored. Stop the server first.", no_args_is_help=True)
    command(keys, "rotate-root", local=True)(_rotate_root)
    command(keys, "rotate-tenants", local=True)(_rotate_tenants)
    command(keys, "rewrap", local=True)(_rewrap)
    app.add_typer(keys, name="keys")
    command(app, "verify-receipt", local=True)(_verify_receipt)
    command(app, "verify-deletion", local=True)(_verify_deletion)


def _rotate_root(session: Session, config: ConfigOption = None, settings: SetOption = None) -> None:
    """Makes a new root key, wraps every tenant's key with it, destroys the old one."""
    _change(session, configured(session, config, settings), rotate_root)


def _rotate_tenants(
    session: Session, config: ConfigOption = None, settings: SetOption = None
) -> None:
    """Gives every tenant a new key; memories' keys are wrapped anew, data is not touched."""
    _change(session, configured(session, config, settings), renew_tenants)


def _rewrap(session: Session, config: ConfigOption = None, settings: SetOption = None) -> None:
    """Wraps every tenant's key with the first root key of the settings."""
    _change(session, configured(session, config, settings), rewrap)


def _change(session: Session, config: Config, change: Callable[[Config], int]) -> None:
    with local_failures(), hold(config.folder):
        count = change(config)
    session.output.result({"tenants": count}, f"Keys of {count} tenants were wrapped anew.")


def _verify_receipt(
    session: Session,
    receipt: Annotated[Path, typer.Argument(help="A receipt of a deletion.")],
    public_key: Annotated[
        Path | None,
        typer.Option(help="The server's public key file.  [default: that of the data folder]"),
    ] = None,
) -> None:
    """Verifies that a receipt is whole and of that server. Needs no server and no network."""
    path = public_key or session.folder / "receipts" / PUBLIC_KEY_FILE
    try:
        statement = verify_receipt(receipt.read_bytes(), read_public_key(path))
    except OSError as error:
        raise ConfigurationError(f"{receipt}: {error.strerror}") from error
    except ReceiptError as error:
        session.output.result({"genuine": False, "problem": str(error)}, f"Not genuine: {error}.")
        raise typer.Exit(ExitCode.FINDINGS) from error
    lines = [f"{name}: {value}" for name, value in sorted(statement.items())]
    session.output.result(
        {"genuine": True, "statement": statement}, "\n".join(["Genuine.", *lines])
    )


def _verify_deletion(
    session: Session,
    canary: Annotated[
        list[str] | None, typer.Option(help="A text that stood in what was deleted; repeatable.")
    ] = None,
    canary_file: Annotated[
        Path | None, typer.Option(help="File of such texts, one a line.")
    ] = None,
    log: Annotated[
        list[Path] | None,
        typer.Option(help="A file or folder elsewhere to search too."),
    ] = None,
    pid: Annotated[
        list[int] | None, typer.Option(help="A process to search too, of a worker that runs apart.")
    ] = None,
) -> None:
    """Searches for texts that were deleted: in every file of the data folder (texts, blocks,
    catalog, staging, receipts) and in the memory of the server and its workers.

    Ends with 13 when one is found, with 1 when something could not be read.
    """
    texts = list(canary or ())
    if canary_file is not None:
        texts += [line for line in canary_file.read_text().splitlines() if line]
    try:
        search = Search(texts)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--canary") from error
    hits = list(search.folder(session.folder))
    for path in log or ():
        hits += search.folder(path) if path.is_dir() else search.file(path)
    for process in {*processes_of(session.folder, session.folder / "memsvc.lock"), *(pid or ())}:
        hits += search.process(process)
    _report(session, search, hits)


def _report(session: Session, search: Search, hits: list[Hit]) -> None:
    searched = search.searched
    for hit in hits[:_MAX_SHOWN]:
        if session.output.as_json:
            session.output.json({"hit": hit})
        else:
            session.output.text(f"canary {hit.canary + 1} in {hit.where} at {hit.offset}")
    for missed in searched.unreadable or ():
        session.output.note(f"not searched: {missed}")
    session.output.result(
        {"hits": len(hits), "searched": dataclasses.asdict(searched)},
        f"{len(hits)} hits in {searched.files} files and {searched.processes} processes, "
        f"{searched.bytes} bytes.",
    )
    if hits:
        raise typer.Exit(ExitCode.FINDINGS)
    if searched.unreadable:
        raise typer.Exit(ExitCode.FAILED)
