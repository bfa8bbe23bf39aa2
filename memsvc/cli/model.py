"""`memsvc model list|attach|detach|pull`."""

from __future__ import annotations

import subprocess
import sys
from typing import Annotated

import typer

from memsvc.cli.exits import ExitCode
from memsvc.cli.memory import MemoryArgument
from memsvc.cli.session import Session, command

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Id or name of the model.")]

model_group = typer.Typer(help="Look at models and fetch the default one.", no_args_is_help=True)


@command(model_group, "list")
def list_models(session: Session) -> None:
    """Lists the models that the server has seen."""
    with session.client() as client:
        models = list(client.models.iterate())
    session.output.rows(
        models,
        ("Model", "Name", "State", "Default", "Document", "Question", "Answer", "Identity"),
        (
            (
                model.name.removeprefix("models/"),
                model.display_name,
                str(model.state),
                "yes" if model.default_model else "",
                f"{model.max_document_tokens} tokens",
                f"{model.max_question_tokens} tokens",
                f"{model.max_answer_tokens} tokens",
                model.identity[:16],
            )
            for model in models
        ),
        empty="No worker has shown a model yet.",
    )


@command(model_group, "attach")
def attach(
    session: Session,
    memory: MemoryArgument,
    model: ModelArgument,
    *,
    default: Annotated[bool, typer.Option(help="It answers as soon as it is complete.")] = False,
) -> None:
    """Has a memory encoded under a further model, in the background."""
    with session.client() as client:
        row = client.models.attach(memory, model, make_default=default)
    session.output.result(row, f"{model} is attached; `memsvc memory watch` shows how far it is.")


@command(model_group, "detach")
def detach(session: Session, memory: MemoryArgument, model: ModelArgument) -> None:
    """Drops what is encoded of a memory under a model; not of the one that answers."""
    with session.client() as client:
        row = client.models.detach(memory, model)
    session.output.result(row, f"{model} is detached.")


@command(model_group, "pull", local=True)
def pull(session: Session) -> None:
    """Fetches the default model into the data folder, unless it is there."""
    # The model side is a process of its own: this one never loads torch.
    arguments = ["--data-dir", str(session.folder)]
    if session.output.as_json:
        arguments.append("--json")
    done = subprocess.run(  # noqa: S603  # our own module; the folder is one argument, no shell
        [sys.executable, "-m", "model_adapter.checkpoints", "pull", *arguments], check=False
    )
    if done.returncode != 0:
        raise typer.Exit(ExitCode.FAILED)
