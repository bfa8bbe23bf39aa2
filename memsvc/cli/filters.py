"""Options that say which documents may be chosen."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated

import typer

from memsvc.client import Filter, Role

OccurredFromOption = Annotated[
    datetime | None,
    typer.Option("--occurred-from", help="Only what was said at this time or later."),
]
OccurredBeforeOption = Annotated[
    datetime | None, typer.Option("--occurred-before", help="Only what was said before this time.")
]
RolesOption = Annotated[
    list[Role] | None, typer.Option("--role", help="Only what was said in this role; repeatable.")
]
SpeakersOption = Annotated[
    list[str] | None, typer.Option("--speaker", help="Only what this one said; repeatable.")
]
MetadataOption = Annotated[
    list[str] | None,
    typer.Option(
        "--metadata",
        metavar="KEY[=VALUE]",
        help="Only with this in the metadata; of one key any of the values. Repeatable.",
    ),
]


def filter_of(
    occurred_from: datetime | None,
    occurred_before: datetime | None,
    roles: Sequence[Role] | None,
    speakers: Sequence[str] | None,
    metadata: Sequence[str] | None,
) -> Filter | None:
    """None when no option was given."""
    wanted: dict[str, list[str]] = {}
    for entry in metadata or ():
        key, equals, value = entry.partition("=")
        wanted.setdefault(key, []).extend([value] if equals else [])
    given = (occurred_from, occurred_before, roles, speakers, wanted)
    if not any(given):
        return None
    return Filter(occurred_from, occurred_before, roles or (), speakers or (), wanted)
