"""`memsvc import-from`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memsvc.cli.session import Session, command
from memsvc.client import ConfigurationError, MemsvcError
from memsvc.client.dumps import Dump, read_dump
from memsvc.client.mapping import known, load


def _import_from(
    session: Session,
    form: Annotated[
        str,
        typer.Argument(
            metavar="FORMAT", help=f"{', '.join(known())}, or a mapping file of one's own (.toml)."
        ),
    ],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The dump, a JSON file.")],
    memory: Annotated[
        str, typer.Option("--memory", help="Memory to add to; else a new one is made.")
    ] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be imported; import nothing.")
    ] = False,
) -> None:
    """Adds another service's conversations and memories.

    All of the dump is read and checked before anything is sent; what is wrong with it is told
    with its place in the file. Given again after an interruption, within a day and for the
    same --memory, it goes on where it was.
    """
    mapping = load(form)
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"Cannot read {file}: {error.strerror}") from error
    dump = read_dump(data, mapping)
    told = {
        "conversations": len(dump.conversations),
        "turns": dump.turns,
        "texts": len(dump.texts),
    }
    if dry_run:
        session.output.result({"memory": None, **told}, f"Would import {_words(dump)}.")
        return
    with (
        session.client() as client,
        session.output.progress("Importing", dump.turns + len(dump.texts)) as bar,
    ):
        name = memory or client.memories.create().name
        try:
            written = client.memory(name).add_dump(dump, on_added=bar.at)
        except MemsvcError:
            session.output.note(f"Not all is imported; to go on: --memory {name}")
            raise
    session.output.result(
        {"memory": name, **told, "documents": written.documents, "revision": written.revision},
        f"Imported {_words(dump)} into {name} as {len(written.documents)} documents.",
    )


def _words(dump: Dump) -> str:
    return (
        f"{len(dump.conversations)} conversations ({dump.turns} turns) and {len(dump.texts)} texts"
    )


def register(app: typer.Typer) -> None:
    """Adds the command of this module to the root."""
    command(app, "import-from")(_import_from)
