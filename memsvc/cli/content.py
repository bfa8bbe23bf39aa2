"""`memsvc memory append|put|query|retrieve|watch`."""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from memsvc.cli.answers import document_lines, show_answer
from memsvc.cli.exits import ExitCode
from memsvc.cli.filters import (
    MetadataOption,
    OccurredBeforeOption,
    OccurredFromOption,
    RolesOption,
    SpeakersOption,
    filter_of,
)
from memsvc.cli.memory import AsOfOption, MemoryArgument, as_of_of, encoding_line, memory_group
from memsvc.cli.session import Session, command
from memsvc.cli.turns import Defaults, Form, TurnsError, parse_turns
from memsvc.client import EncodingState, Generation, Progress, Role, TextSource, Turn
from memsvc.client.batching import batches

FileArgument = Annotated[str, typer.Argument(metavar="FILE", help="A file, or - for stdin.")]
QuestionArgument = Annotated[str, typer.Argument(metavar="QUESTION", help="- reads it from stdin.")]
ModelOption = Annotated[str, typer.Option("--model", help="Model; else the default one.")]
RevisionOption = Annotated[
    int, typer.Option("--at-least-revision", min=0, help="Revision the answer must see.")
]
LexicalWeightOption = Annotated[
    float | None,
    typer.Option(
        "--lexical-weight",
        min=0,
        max=1,
        help="Share of the question's words in the choice of documents; else the model's own.",
    ),
]
LatestOption = Annotated[
    bool,
    typer.Option("--prefer-latest", help="Of documents that say about the same, the latest first."),
]
TimeoutOption = Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds to wait.")]


def _lines(file: str) -> list[str]:
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(str(error), param_hint="FILE") from error
    return text.split("\n")


def _turns(file: str, form: Form, defaults: Defaults) -> list[Turn]:
    try:
        turns = parse_turns(_lines(file), form, defaults)
    except TurnsError as error:
        raise typer.BadParameter(str(error), param_hint="FILE") from error
    if not turns:
        raise typer.BadParameter("there are no turns in it", param_hint="FILE")
    return turns


@command(memory_group, "append")
def append(
    session: Session,
    *,
    memory: MemoryArgument,
    file: Annotated[str, typer.Argument(metavar="[FILE]", help="A file, or - for stdin.")] = "-",
    text: Annotated[str | None, typer.Option("--text", help="One turn, instead of a file.")] = None,
    form: Annotated[Form, typer.Option("--format", help="How the lines are read.")] = Form.AUTO,
    role: Annotated[Role, typer.Option(help="Role of turns that name none.")] = Role.USER,
    speaker: Annotated[str, typer.Option(help="Speaker of turns that name none.")] = "",
    session_id: Annotated[
        str, typer.Option("--session", help="Session of turns that name none.")
    ] = "",
) -> None:
    """Appends conversation turns: one per line, as JSON or as plain text.

    JSON: {"role": "user", "text": "...", "speaker": "...", "occurred_at":
    "2026-03-01T18:30:00Z", "session": "...", "metadata": {}}. All lines are read
    and checked before the first is sent.
    """
    defaults = Defaults(role, speaker, session_id)
    if text is not None:
        turns = [Turn(role, text, speaker=speaker, session=session_id)]
    else:
        turns = _turns(file, form, defaults)
    documents: list[str] = []
    revision = 0
    with session.client() as client, session.output.progress("Appending", len(turns)) as bar:
        handle = client.memory(memory)
        for batch in batches(turns):
            written = handle.append(batch)
            documents += written.documents
            revision = written.revision
            bar.advance(len(batch))
    session.output.result(
        {"turns": len(turns), "documents": documents, "revision": revision},
        f"Appended {len(turns)} turns as {len(documents)} documents; revision {revision}.",
    )


@command(memory_group, "put")
def put(
    session: Session,
    memory: MemoryArgument,
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Files; - for stdin.")],
    title: Annotated[str, typer.Option(help="Title; else the file's name.")] = "",
    occurred_at: Annotated[datetime | None, typer.Option(help="When it was written.")] = None,
) -> None:
    """Adds texts, each its own document: all of them, or none."""
    sources = [
        TextSource(
            "\n".join(_lines(file)),
            title=title or ("" if file == "-" else Path(file).name),
            occurred_at=occurred_at,
        )
        for file in files
    ]
    with session.client() as client:
        written = client.memory(memory).put(sources)
    session.output.result(
        written, f"Added {len(written.documents)} documents; revision {written.revision}."
    )


def _question(text: str) -> str:
    return sys.stdin.read().strip() if text == "-" else text


@command(memory_group, "query")
def query(
    session: Session,
    *,
    memory: MemoryArgument,
    question: QuestionArgument,
    model: ModelOption = "",
    at_least_revision: RevisionOption = 0,
    as_of: AsOfOption = "",
    max_tokens: Annotated[int, typer.Option(min=0, help="Most tokens of the answer.")] = 0,
    top_k: Annotated[int, typer.Option(min=0, help="Documents per routed layer.")] = 0,
    temperature: Annotated[float, typer.Option(min=0, help="0: greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Makes sampling repeatable.")] = 0,
    lexical_weight: LexicalWeightOption = None,
    prefer_latest: LatestOption = False,
    occurred_from: OccurredFromOption = None,
    occurred_before: OccurredBeforeOption = None,
    role: RolesOption = None,
    speaker: SpeakersOption = None,
    metadata: MetadataOption = None,
    timeout_s: TimeoutOption = 300.0,
) -> None:
    """Asks the memory; the answer is printed as it comes, then what it cites."""
    options = Generation(
        max_answer_tokens=max_tokens,
        top_k=top_k,
        temperature=temperature,
        seed=seed,
        lexical_weight=lexical_weight,
        prefer_latest=prefer_latest,
    )
    only = filter_of(occurred_from, occurred_before, role, speaker, metadata)
    with session.client() as client:
        events = client.memory(memory).query(
            _question(question),
            model=model,
            at_least_revision=at_least_revision,
            as_of=as_of_of(as_of),
            only=only,
            options=options,
            timeout_s=timeout_s,
        )
        show_answer(session.output, events)


@command(memory_group, "retrieve")
def retrieve(
    session: Session,
    *,
    memory: MemoryArgument,
    question: QuestionArgument,
    limit: Annotated[int, typer.Option(min=0, max=100, help="Documents to return.")] = 0,
    model: ModelOption = "",
    at_least_revision: RevisionOption = 0,
    lexical_weight: LexicalWeightOption = None,
    prefer_latest: LatestOption = False,
    as_of: AsOfOption = "",
    occurred_from: OccurredFromOption = None,
    occurred_before: OccurredBeforeOption = None,
    role: RolesOption = None,
    speaker: SpeakersOption = None,
    metadata: MetadataOption = None,
    timeout_s: TimeoutOption = 300.0,
) -> None:
    """Ranks documents for a question; generates nothing."""
    only = filter_of(occurred_from, occurred_before, role, speaker, metadata)
    with session.client() as client:
        found = client.memory(memory).retrieve(
            _question(question),
            limit=limit,
            model=model,
            at_least_revision=at_least_revision,
            lexical_weight=lexical_weight,
            prefer_latest=prefer_latest,
            as_of=as_of_of(as_of),
            only=only,
            timeout_s=timeout_s,
        )
    session.output.rows(
        found.documents,
        ("Document", "Score", "Routing", "Words", "Layers", "Content"),
        (
            (
                str(ranked.number),
                f"{ranked.score:.3f}",
                f"{ranked.routing_score:.2f}",
                f"{ranked.lexical_score:.2f}",
                " ".join(str(layer.layer) for layer in ranked.layers),
                "\n".join(document_lines(ranked.content)),
            )
            for ranked in found.documents
        ),
        empty="The memory holds no encoded document.",
    )


@command(memory_group, "watch")
def watch(
    session: Session,
    memory: MemoryArgument,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until interrupted.")] = False,
    timeout_s: Annotated[float | None, typer.Option("--timeout", help="Seconds to wait.")] = None,
) -> None:
    """Shows encoding progress until every document is encoded."""
    output = session.output
    with session.client() as client, output.progress("Encoding", None) as bar:
        last: Progress | None = None
        for progress in client.memory(memory).watch(timeout_s=timeout_s):
            if output.as_json:
                output.json(progress)
            elif follow or not output.errors.is_terminal:
                output.text(_progress_line(progress))
            done = sum(encoding.encoded_documents for encoding in progress.encodings)
            bar.at(done, done + progress.pending_documents)
            last = progress
            if not follow and _settled(progress):
                break
    if last is not None and not output.as_json and not follow and output.errors.is_terminal:
        output.text(_progress_line(last))
    if last is not None and any(e.state is EncodingState.FAILED for e in last.encodings):
        raise typer.Exit(ExitCode.FAILED)


def _settled(progress: Progress) -> bool:
    states = {encoding.state for encoding in progress.encodings}
    return bool(states) and EncodingState.ENCODING not in states


def _progress_line(progress: Progress) -> str:
    states = "; ".join(encoding_line(encoding) for encoding in progress.encodings)
    return f"revision {progress.revision}: {states or 'no model has been seen yet'}"
