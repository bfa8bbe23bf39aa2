"""`memsvc model list|pull`."""

from __future__ import annotations

import subprocess
import sys

import typer

from memsvc.cli.exits import ExitCode
from memsvc.cli.session import Session, command

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
