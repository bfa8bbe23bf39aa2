"""The `memsvc` command: all its parts in one place."""

from __future__ import annotations

import typer

from memsvc.cli import content, local, privacy, upkeep
from memsvc.cli.admin import admin_group
from memsvc.cli.audit import audit_group
from memsvc.cli.document import document_group
from memsvc.cli.memory import memory_group
from memsvc.cli.model import model_group

app = typer.Typer(
    name="memsvc",
    help="Memory as a Service: long-term memories that outlive sessions, servers and models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
local.register(app)
upkeep.register(app)
privacy.register(app)
app.add_typer(memory_group, name="memory")
app.add_typer(document_group, name="document")
app.add_typer(model_group, name="model")
app.add_typer(admin_group, name="admin")
app.add_typer(audit_group, name="audit")

#: Importing it adds its commands to memory_group.
CONTENT = content


def main() -> None:
    """Runs the command line and ends the process with its exit code."""
    app()
