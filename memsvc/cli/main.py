"""The `memsvc` command: all its parts in one place."""

from __future__ import annotations

import sys

import typer

from memsvc.cli import archive, content, foreign
from memsvc.cli.admin import admin_group
from memsvc.cli.document import document_group
from memsvc.cli.memory import memory_group
from memsvc.cli.model import model_group

#: Importing it adds its commands to memory_group.
CONTENT = content

#: Commands of a client: they need nothing of the server but its address.
_GROUPS = {
    "memory": memory_group,
    "document": document_group,
    "model": model_group,
    "admin": admin_group,
}


def build(command: str = "") -> typer.Typer:
    """The command line; without the server's own commands when a client's is asked for.

    Those load the server and its database library, which takes longer than most client
    commands take.
    """
    app = typer.Typer(
        name="memsvc",
        help="Memory as a Service: long-term memories that outlive sessions, servers and models.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    if command not in _GROUPS:
        # Late, as said above.
        from memsvc.cli import local, privacy, upkeep  # noqa: PLC0415
        from memsvc.cli.audit import audit_group  # noqa: PLC0415

        local.register(app)
        upkeep.register(app)
        privacy.register(app)
        app.add_typer(audit_group, name="audit")
    archive.register(app)
    foreign.register(app)
    for name, group in _GROUPS.items():
        app.add_typer(group, name=name)
    return app


def main() -> None:
    """Runs the command line and ends the process with its exit code."""
    build(sys.argv[1] if len(sys.argv) > 1 else "")()
