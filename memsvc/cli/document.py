"""`memsvc document list|get|delete`: what is in a memory."""

from __future__ import annotations

from typing import Annotated

import typer

from memsvc.cli.answers import document_lines
from memsvc.cli.filters import (
    MetadataOption,
    OccurredBeforeOption,
    OccurredFromOption,
    RolesOption,
    SpeakersOption,
    filter_of,
)
from memsvc.cli.memory import AsOfOption, MemoryArgument, as_of_of
from memsvc.cli.output import moment, size
from memsvc.cli.session import Session, command

document_group = typer.Typer(help="Look at and delete documents.", no_args_is_help=True)

_SHOWN_CHARACTERS = 100


@command(document_group, "list")
def list_documents(
    session: Session,
    *,
    memory: MemoryArgument,
    full: Annotated[bool, typer.Option("--full", help="With their sources.")] = False,
    as_of: AsOfOption = "",
    occurred_from: OccurredFromOption = None,
    occurred_before: OccurredBeforeOption = None,
    role: RolesOption = None,
    speaker: SpeakersOption = None,
    metadata: MetadataOption = None,
) -> None:
    """Lists a memory's documents by ascending number."""
    then = as_of_of(as_of)
    only = filter_of(occurred_from, occurred_before, role, speaker, metadata)
    with session.client() as client:
        shown = full or not session.output.as_json
        documents = list(client.memory(memory).documents.iterate(full=shown, as_of=then, only=only))
    session.output.rows(
        documents,
        ("Number", "Revision", "Bytes", "Content"),
        (
            (
                str(document.number),
                str(document.revision),
                str(document.text_bytes),
                "\n".join(line if full else _short(line) for line in document_lines(document)),
            )
            for document in documents
        ),
        empty="No document matches." if only else "The memory is empty.",
    )


def _short(line: str) -> str:
    head = line.split("\n", 1)[0]
    return head if len(head) <= _SHOWN_CHARACTERS else f"{head[: _SHOWN_CHARACTERS - 1]}…"


@command(document_group, "get")
def get(
    session: Session,
    memory: MemoryArgument,
    number: Annotated[int, typer.Argument(metavar="NUMBER", help="The document's number.")],
) -> None:
    """Shows one document with its source."""
    with session.client() as client:
        document = client.memory(memory).documents.get(number)
    session.output.fields(
        document,
        [
            ("name", document.name),
            ("revision", str(document.revision)),
            ("created", moment(document.create_time)),
            ("size", size(document.text_bytes)),
            ("source", "\n".join(document_lines(document))),
        ],
    )


@command(document_group, "delete")
def delete(
    session: Session,
    memory: MemoryArgument,
    numbers: Annotated[list[int], typer.Argument(metavar="NUMBER...", help="Which ones.")],
) -> None:
    """Deletes all the documents named, or none. There is no way back."""
    with session.client() as client:
        revision = client.memory(memory).documents.delete(numbers)
    session.output.result(
        {"deleted": numbers, "revision": revision},
        f"Deleted {len(numbers)} documents; revision {revision}.",
    )
