"""The whole story of one memory, told on a terminal: `scripts/demo`.

Fetches the default model (once), makes a server of its own in a temporary
folder, and lets a client create a memory, fill it, ask it, export it, import it
and delete it. Nothing is simulated; a step that fails ends the story with an error.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from examples.demo_server import DemoError, DemoServer, pull_default_model
from examples.demo_story import CONVERSATION, QUESTIONS, Question, read_conversation
from memsvc.client import (
    Citation,
    Client,
    Conversation,
    Done,
    EncodingState,
    Generation,
    MemoryHandle,
    MemsvcError,
    NotFoundError,
    TextDelta,
    Usage,
)

#: Short answers: the default model is a small one.
OPTIONS = Generation(max_answer_tokens=32)
console = Console(highlight=False)


class Step:
    """Announces a step, and says how long it took."""

    count = 0

    def __init__(self, title: str) -> None:
        Step.count += 1
        self._title = f"{Step.count}. {title}"

    def __enter__(self) -> Step:
        console.print(f"\n[bold]{self._title}[/bold]")
        self._started = time.monotonic()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if error is None:
            self.say(f"[dim]{time.monotonic() - self._started:.1f} s[/dim]")

    def say(self, text: str, *, markup: bool = True) -> None:
        console.print(
            Padding(
                text if markup else console.render_str(text, markup=False), (0, 3), expand=False
            )
        )


def fill(client: Client, memory: MemoryHandle) -> None:
    """Creates the memory and appends one session after the other."""
    sessions = read_conversation()
    turns = sum(map(len, sessions.values()))
    with Step(f"Create a memory, and append {turns} turns of {len(sessions)} sessions") as step:
        client.memories.create(memory.id, display_name="Marta and Jun")
        for session, said in sessions.items():
            started = time.monotonic()
            written = memory.append(said)
            took = (time.monotonic() - started) * 1000
            step.say(
                f"{session}: {len(said)} turns are on disk after {took:.0f} ms, "
                f"revision {written.revision}"
            )


def encode(memory: MemoryHandle) -> None:
    """Watches until the worker has turned every document into a KV block."""
    with Step("The worker reads them into compressed KV blocks") as step:
        with Progress(
            TextColumn("   encoding"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        ) as bars:
            bar = bars.add_task("encoding", total=None)
            for progress in memory.watch(timeout_s=600):
                done = sum(e.encoded_documents for e in progress.encodings)
                bars.update(bar, completed=done, total=done + progress.pending_documents)
                if not console.is_terminal:
                    step.say(f"{done} documents encoded, {progress.pending_documents} waiting")
                states = {encoding.state for encoding in progress.encodings}
                if EncodingState.FAILED in states:
                    raise DemoError("encoding failed")
                if states == {EncodingState.READY}:
                    break
        for encoding in progress.encodings:
            step.say(
                f"{encoding.encoded_documents} documents, {encoding.tokens} tokens, "
                f"{encoding.bytes / 1024:.0f} KiB of blocks under {encoding.model}"
            )


def ask(memory: MemoryHandle, question: Question) -> bool:
    """Streams one answer, then shows what it was drawn from and what it took. Says whether it is
    right and the turn that says so is cited."""
    console.print(f"\n   [bold cyan]{question.text}[/bold cyan]")
    console.print("   ", end="")
    answer = ""
    citations: list[Citation] = []
    usage: Usage | None = None
    done: Done | None = None
    for event in memory.query(question.text, options=OPTIONS):
        match event:
            case TextDelta(text=text):
                answer += text
                console.print(text.replace("\n", " "), end="", markup=False, soft_wrap=True)
            case Citation():
                citations.append(event)
            case Usage():
                usage = event
            case Done():
                done = event
    console.print()
    if usage is None or done is None or not citations:
        raise DemoError("the answer came without citations, usage or an end")
    for citation in citations:
        show(citation)
    console.print(
        f"   [dim]{usage.routed_documents} documents searched in {usage.routing_ms:.0f} ms, "
        f"first word after {usage.time_to_first_token_ms:.0f} ms, {usage.answer_tokens} tokens "
        f"in {usage.total_ms / 1000:.1f} s[/dim]"
    )
    right = question.answered_by(answer)
    cited = question.turn in {citation.number for citation in citations}
    if not (right and cited):
        console.print(f"   [dim]not right: turn {question.turn} says it[/dim]")
    return right and cited


def show(citation: Citation) -> None:
    """A cited document: its number, and date, speaker and text of each turn."""
    source = citation.content.source if citation.content else None
    if not isinstance(source, Conversation):
        raise DemoError(f"{citation.document} was cited without its turns")
    for turn in source.turns:
        date = f"{turn.occurred_at:%-d %b %Y}" if turn.occurred_at else "undated"
        line = console.render_str(
            f"[{citation.number}] {date}, {turn.speaker}: {turn.text}", markup=False
        )
        console.print(Padding(line, (0, 0, 0, 6), expand=False), style="green")


def move(client: Client, memory: MemoryHandle, folder: Path, question: Question) -> MemoryHandle:
    """Exports the memory, and imports it under another name."""
    archive = folder / "marta.memsvc"
    with Step("Export the memory as one file, and import it under another name") as step:
        written = memory.export_to(archive)
        step.say(f"{archive.name}: {written / 1024:.0f} KiB, text and KV blocks")
        made = client.memories.import_archive(archive, memory_id="marta-copy")
        step.say(
            f"{made.memory.name}: {made.memory.document_count} documents, "
            f"{made.reused_blocks} blocks taken over, {made.documents_to_encode} to encode"
        )
        copy = client.memory(made.memory.name)
        ask(copy, question)
    return copy


def delete(client: Client, memories: list[MemoryHandle]) -> None:
    """Deletes the memories, and makes sure that nothing answers any more."""
    with Step("Delete both") as step:
        for memory in memories:
            client.memories.delete(memory.name)
            try:
                memory.ask("Is anybody there?")
            except NotFoundError as error:
                step.say(f"{memory.name} is gone: {error.reason}")
            else:
                raise DemoError(f"{memory.name} still answers after its deletion")


def tell(model: str, cache: Path, folder: Path, patience_s: float) -> None:
    """The story, from the model's arrival to the last deletion."""
    if model == "default":
        with Step("Fetch the default model, unless it is here") as step:
            step.say(pull_default_model(cache), markup=False)
    with Step("Make a data folder and serve on a free port") as step:
        server = DemoServer(folder / "data", cache, model)
        server.start()
        step.say(f"memsvc serves on {server.address}, with one model worker on this CPU")
    try:
        with Client(server.address, server.api_key) as client:
            memory = client.memory("marta")
            with Step("Wait until the worker has loaded the model") as step:
                step.say(server.wait_for_model(client, patience_s), markup=False)
            fill(client, memory)
            encode(memory)
            with Step("Ask") as step:
                step.say(
                    "[dim]Each answer is drawn from the documents that the model's attention and "
                    "the question's words chose; they stand below it, by date and speaker. The "
                    "default model is a small one: expect wrong words now and then.[/dim]"
                )
                right = sum([ask(memory, question) for question in QUESTIONS])
                console.print()
                step.say(
                    f"{right} of {len(QUESTIONS)} answers are right, "
                    "with the turn that says so among those cited."
                )
            copy = move(client, memory, folder, QUESTIONS[-1])
            delete(client, [memory, copy])
    except BaseException:
        console.print(server.log_tail(), markup=False, style="dim")
        raise
    finally:
        server.stop()
    with Step("Stop the server and verify what it left") as step:
        step.say(server.check(), markup=False)


def main() -> int:
    """0 when every step worked; 1 otherwise."""
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__)
    parser.add_argument("--model", default="default", help="default, fake or a path")
    parser.add_argument("--cache", type=Path, default=Path(".data"), help="keeps fetched models")
    parser.add_argument("--patience", type=float, default=600.0, help="seconds for the worker")
    options = parser.parse_args()
    started = time.monotonic()
    console.print(f"The sample conversation is {CONVERSATION.name}; this is what happens to it.")
    with tempfile.TemporaryDirectory(prefix="memsvc-demo-") as folder:
        try:
            tell(options.model, options.cache.absolute(), Path(folder), options.patience)
        except (DemoError, MemsvcError) as error:
            console.print(f"\nThe demo failed: {error}", markup=False, style="bold red")
            return 1
    console.print(f"\n[bold]Done in {time.monotonic() - started:.1f} s.[/bold]")
    return 0


if __name__ == "__main__":
    sys.exit(main())
