"""`memsvc memory ...`: make, look at, change and delete memories."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

import typer

from memsvc.cli.output import moment, size
from memsvc.cli.session import Session, command
from memsvc.client import Encoding, Memory, Packing, PackingMode

memory_group = typer.Typer(
    help="Create, fill, ask, export and delete memories.", no_args_is_help=True
)

MemoryArgument = Annotated[str, typer.Argument(metavar="MEMORY", help="Id or name of the memory.")]
LabelsOption = Annotated[
    list[str] | None, typer.Option("--label", help="KEY=VALUE; may be repeated.")
]


def labels_of(pairs: list[str] | None) -> dict[str, str] | None:
    """Options KEY=VALUE as a mapping; None when there are none."""
    if not pairs:
        return None
    labels: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise typer.BadParameter(f"{pair!r} is not KEY=VALUE", param_hint="--label")
        labels[key] = value
    return labels


def encoding_line(encoding: Encoding) -> str:
    """How far one model has read a memory, for people."""
    text = (
        f"{encoding.model}: {encoding.state}, {encoding.encoded_documents} encoded, "
        f"{encoding.pending_documents} waiting, {encoding.tokens} tokens, {size(encoding.bytes)}"
    )
    if encoding.quarantined_documents:
        text += f", {encoding.quarantined_documents} set aside"
    if not encoding.complete:
        text += ", catching up"
    return f"{text} ({encoding.failure})" if encoding.failure else text


def _rows(memory: Memory) -> list[tuple[str, str]]:
    packing = memory.packing
    rows = [
        ("name", memory.name),
        ("uid", memory.uid),
        ("display name", memory.display_name),
        ("labels", ", ".join(f"{k}={v}" for k, v in sorted(memory.labels.items()))),
        ("state", str(memory.state)),
        ("revision", str(memory.revision)),
        ("documents", f"{memory.document_count} ({size(memory.text_bytes)} of text)"),
        ("packing", str(packing.mode)),
        ("created", moment(memory.create_time)),
        ("updated", moment(memory.update_time)),
        ("etag", memory.etag),
        (
            "model",
            memory.default_model + (f" (then {memory.next_model})" * bool(memory.next_model)),
        ),
    ]
    if memory.forked_from_uid:
        rows.append(("forked", f"from {memory.forked_from_uid} at {memory.forked_revision}"))
    return rows + [("encoding", encoding_line(encoding)) for encoding in memory.encodings]


AsOfOption = Annotated[
    str, typer.Option(metavar="REVISION|TIME", help="The memory as it was then; time in RFC 3339.")
]


def as_of_of(text: str) -> int | datetime | None:
    """A revision or a time; None for none."""
    if not text:
        return None
    if text.isdecimal():
        return int(text)
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is neither a revision nor a time", param_hint="--as-of"
        ) from None


@command(memory_group, "revisions")
def revisions(
    session: Session,
    memory: MemoryArgument,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Most to show.")] = 50,
) -> None:
    """Lists what each write made, newest first."""
    with session.client() as client:
        page = client.memory(memory).revisions(page_size=limit)
    session.output.rows(
        page.items,
        ("Revision", "Written", "Added", "Deleted"),
        (
            (
                str(one.revision),
                moment(one.create_time),
                str(one.documents_added),
                str(one.documents_removed),
            )
            for one in page.items
        ),
        empty="Nothing was ever written.",
    )


@command(memory_group, "fork")
def fork(
    session: Session,
    *,
    memory: MemoryArgument,
    to: Annotated[str, typer.Argument(metavar="[NEW]", help="Id; else one is made.")] = "",
    display_name: Annotated[str, typer.Option(help="Name for people; else the same.")] = "",
    as_of: AsOfOption = "",
) -> None:
    """Makes a new memory that shares what this one holds, or held."""
    with session.client() as client:
        made = client.memory(memory).fork(to, display_name=display_name, as_of=as_of_of(as_of))
    text = f"Forked {made.memory.name} with {made.memory.document_count} documents"
    missing = f"; {made.documents_missing} of then were deleted since"
    session.output.result(made, text + missing * bool(made.documents_missing) + ".")


@command(memory_group, "restore")
def restore(
    session: Session,
    memory: MemoryArgument,
    revision: Annotated[int, typer.Option(min=1, help="Go back to this one.")],
) -> None:
    """Deletes what was added after a revision. There is no way back: fork first to keep it."""
    with session.client() as client:
        made = client.memory(memory).restore(revision)
    text = f"Deleted {made.documents_removed} documents in revision {made.revision}"
    missing = f"; {made.documents_missing} of then were deleted before and stay so"
    session.output.result(made, text + missing * bool(made.documents_missing) + ".")


@command(memory_group, "create")
def create(
    session: Session,
    *,
    memory: Annotated[str, typer.Argument(metavar="[MEMORY]", help="Id; else one is made.")] = "",
    display_name: Annotated[str, typer.Option(help="Name for people.")] = "",
    label: LabelsOption = None,
    packing: Annotated[
        PackingMode, typer.Option(help="How turns become documents.")
    ] = PackingMode.DEFAULT,
    window_turns: Annotated[int, typer.Option(min=0, help="Turns per document (window).")] = 0,
) -> None:
    """Makes an empty memory."""
    with session.client() as client:
        made = client.memories.create(
            memory,
            display_name=display_name,
            labels=labels_of(label),
            packing=Packing(packing, window_turns=window_turns),
        )
    session.output.result(made, f"Created {made.name}.")


@command(memory_group, "list")
def list_memories(session: Session) -> None:
    """Lists the tenant's memories, newest first."""
    with session.client() as client:
        memories = list(client.memories.iterate())
    session.output.rows(
        memories,
        ("Memory", "Name", "State", "Documents", "Text", "Revision", "Waiting", "Updated"),
        (
            (
                memory.id,
                memory.display_name,
                str(memory.state),
                str(memory.document_count),
                size(memory.text_bytes),
                str(memory.revision),
                str(sum(encoding.pending_documents for encoding in memory.encodings)),
                moment(memory.update_time),
            )
            for memory in memories
        ),
        empty="There are no memories.",
    )


@command(memory_group, "show")
def show(session: Session, memory: MemoryArgument) -> None:
    """Shows one memory with its encodings."""
    with session.client() as client:
        found = client.memories.get(memory)
    session.output.fields(found, _rows(found))


@command(memory_group, "update")
def update(
    session: Session,
    *,
    memory: MemoryArgument,
    display_name: Annotated[str | None, typer.Option(help="New name for people.")] = None,
    label: LabelsOption = None,
    clear_labels: Annotated[bool, typer.Option("--clear-labels", help="Drop all labels.")] = False,
    etag: Annotated[str, typer.Option(help="Refuse when the memory has another one.")] = "",
) -> None:
    """Changes the display name, or the labels as a whole."""
    labels = {} if clear_labels else labels_of(label)
    if display_name is None and labels is None:
        raise typer.BadParameter("give --display-name, --label or --clear-labels")
    with session.client() as client:
        changed = client.memories.update(
            memory, display_name=display_name, labels=labels, etag=etag
        )
    session.output.result(changed, f"Updated {changed.name}.")


@command(memory_group, "delete")
def delete(
    session: Session,
    memory: MemoryArgument,
    etag: Annotated[str, typer.Option(help="Refuse when the memory has another one.")] = "",
    missing_ok: Annotated[
        bool, typer.Option("--missing-ok", help="Succeed when there is none.")
    ] = False,
) -> None:
    """Deletes a memory with all that is in it. There is no way back."""
    with session.client() as client:
        client.memories.delete(memory, etag=etag, allow_missing=missing_ok)
    session.output.result({"deleted": memory}, f"Deleted {memory}.")
