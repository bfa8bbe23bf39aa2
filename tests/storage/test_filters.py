"""What a filter means."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from storage.documents import Conversation, Role, TextSource, Turn
from storage.filters import DocumentFilter, MetadataCondition, matches

MARCH, APRIL, MAY = (datetime(2026, month, 1, tzinfo=UTC) for month in (3, 4, 5))
TALK = Conversation(
    (
        Turn(Role.USER, "I moved.", MARCH, "Anna", metadata={"app": "mail", "mood": ""}),
        Turn(Role.ASSISTANT, "Where to?", APRIL),
        Turn(Role.USER, "And I paint.", None, "Bob", metadata={"app": "chat"}),
    )
)
NOTE = TextSource("Buy milk.", "Note", APRIL, {"app": "notes"})


def of(key: str, *values: str) -> MetadataCondition:
    return MetadataCondition(key, frozenset(values))


@pytest.mark.parametrize(
    ("wanted", "talk", "note"),
    [
        (DocumentFilter(), True, True),
        (DocumentFilter(occurred_from=APRIL), True, True),
        (DocumentFilter(occurred_from=APRIL + timedelta(microseconds=1)), False, False),
        (DocumentFilter(occurred_before=MARCH), False, False),
        (DocumentFilter(occurred_before=APRIL), True, False),
        (DocumentFilter(occurred_from=MAY, occurred_before=MARCH), False, False),
        (DocumentFilter(roles=frozenset([Role.ASSISTANT, Role.TOOL])), True, False),
        (DocumentFilter(roles=frozenset([Role.SYSTEM])), False, False),
        (DocumentFilter(speakers=frozenset(["Anna"])), True, False),
        (DocumentFilter(speakers=frozenset(["anna", "user", "assistant"])), False, False),
        (DocumentFilter(metadata=(of("app"),)), True, True),
        (DocumentFilter(metadata=(of("app", "chat", "notes"),)), True, True),
        (DocumentFilter(metadata=(of("mood", ""),)), True, False),
        (DocumentFilter(metadata=(of("mood", "app"),)), False, False),
        (DocumentFilter(metadata=(of("app", "mail"), of("mood"))), True, False),
        (DocumentFilter(metadata=(of("app", "chat"), of("mood"))), False, False),
    ],
)
def test_one_turn_must_meet_every_condition(wanted: DocumentFilter, talk: bool, note: bool) -> None:
    assert (matches(wanted, TALK), matches(wanted, NOTE)) == (talk, note)


def test_conditions_do_not_meet_across_turns() -> None:
    anna = frozenset(["Anna"])
    assert matches(DocumentFilter(speakers=anna, occurred_before=APRIL), TALK)
    assert not matches(DocumentFilter(speakers=anna, occurred_from=APRIL), TALK)
    assert not matches(DocumentFilter(speakers=frozenset(["Bob"]), occurred_before=MAY), TALK)
