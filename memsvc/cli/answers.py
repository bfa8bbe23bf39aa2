"""Shows a query's events as they come."""

from __future__ import annotations

from collections.abc import Iterable

from memsvc.cli.output import Output, moment
from memsvc.client import (
    Citation,
    Conversation,
    Document,
    Done,
    DoneReason,
    QueryEvent,
    Routing,
    TextDelta,
    TextSource,
    Usage,
)

_EVENT_NAMES = {
    Routing: "routing",
    Citation: "citation",
    TextDelta: "text",
    Usage: "usage",
    Done: "done",
}


def document_lines(document: Document | None) -> list[str]:
    """A document's content for people, one line per turn."""
    match document.source if document else None:
        case Conversation(turns=turns):
            return [
                f"{moment(turn.occurred_at)}  {turn.speaker or turn.role}: {turn.text}"
                for turn in turns
            ]
        case TextSource() as text:
            head = f"{moment(text.occurred_at)}  {text.title}".rstrip()
            return [head, text.text]
    return []


def show_answer(output: Output, events: Iterable[QueryEvent]) -> None:
    """Streams the answer; what it cites and what it took come after it."""
    citations: list[Citation] = []
    usage: Usage | None = None
    done: Done | None = None
    for event in events:
        if output.as_json:
            output.json({"event": _EVENT_NAMES[type(event)], "data": event})
            continue
        match event:
            case TextDelta(text=text):
                output.text(text, end="")
            case Citation():
                citations.append(event)
            case Usage():
                usage = event
            case Done():
                done = event
    if output.as_json:
        return
    output.text()
    show_citations(output, citations)
    if usage is not None and done is not None:
        output.note(f"\n{usage_line(usage)}{_END_NOTES.get(done.reason, '')}")


_END_NOTES = {
    DoneReason.LENGTH: "; cut at the most tokens an answer may have",
    DoneReason.ROUNDS: "; ended without an answer after the last round",
}


def show_citations(output: Output, citations: Iterable[Citation]) -> None:
    """The cited documents, in the order the answer drew on them."""
    for citation in citations:
        first, *rest = document_lines(citation.content) or [citation.document]
        output.text(f"  [{citation.number}] {first}")
        for line in rest:
            output.text(f"      {line}")


def usage_line(usage: Usage) -> str:
    """What an answer took, on one line."""
    return (
        f"{usage.answer_tokens} tokens from {usage.routed_documents} documents "
        f"({usage.routed_chunks} chunks); routing {usage.routing_ms:.0f} ms, "
        f"first token after {usage.time_to_first_token_ms:.0f} ms, "
        f"all in {usage.total_ms:.0f} ms"
    )
