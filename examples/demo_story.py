"""What the demo remembers and asks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from memsvc.cli.turns import Defaults, Form, parse_turns
from memsvc.client import Turn

CONVERSATION = Path(__file__).with_name("conversation.jsonl")


@dataclass(frozen=True)
class Question:
    """answers: spellings of which a right answer contains one. turn: the number of the document
    that says so."""

    text: str
    answers: tuple[str, ...]
    turn: int

    def answered_by(self, answer: str) -> bool:
        """Whether the answer is right."""
        return any(spelling.lower() in answer.lower() for spelling in self.answers)


#: The last of them is asked again after the memory has moved.
QUESTIONS = (
    Question("What can Marta not eat?", ("peanut",), 13),
    Question("Who is the librarian in charge?", ("Helena Duarte",), 21),
    Question("How much is the rent a month?", ("640 euro", "€640", "640 €"), 3),
    Question("What did Marta find pressed in ledger number seven?", ("letter",), 31),
    Question("What did the clerk's aunt run in Coimbra?", ("chocolate shop",), 66),
    Question("How old is Mr Hayashi?", ("seventy-eight", "78"), 43),
    Question("Where is Marta's workshop?", ("Rua das Flores", "Porto"), 1),
    Question("When does Jun come home?", ("6 June", "June 6", "6th of June"), 67),
    Question("How much did Marta pay for the board shear?", ("310 euro", "€310", "310 €"), 9),
    Question("For how many yen was the fog bowl sold?", ("180,000", "180000"), 58),
)


def read_conversation() -> dict[str, list[Turn]]:
    """The sample's turns by session, in order."""
    sessions: dict[str, list[Turn]] = {}
    with CONVERSATION.open(encoding="utf-8") as lines:
        for turn in parse_turns(lines, Form.JSONL, Defaults()):
            sessions.setdefault(turn.session, []).append(turn)
    return sessions
