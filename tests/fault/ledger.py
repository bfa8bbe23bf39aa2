"""What writers and deleters did and what the server owes them. No I/O here.

A turn's text is its identity: "w3 n17 ..." is the 17th turn of writer 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Ledger:
    """One writer's turns in one memory, in the order they were sent."""

    memory: str
    writer: str
    #: Sent turns by text, in order; True once a reply acknowledged it.
    sent: dict[str, bool] = field(default_factory=dict)
    #: Document name of each acknowledged turn.
    documents: dict[str, str] = field(default_factory=dict)
    #: Revision of the append of each acknowledged turn.
    revisions: dict[str, int] = field(default_factory=dict)
    #: Turns asked to be deleted; True once a reply acknowledged it.
    deleted: dict[str, bool] = field(default_factory=dict)
    #: Revision of the latest acknowledged append.
    revision: int = 0

    def send(self, count: int) -> list[str]:
        """Texts of the next turns."""
        texts = [f"{self.writer} n{len(self.sent) + n} remembers" for n in range(count)]
        self.sent |= dict.fromkeys(texts, False)
        return texts

    def acknowledge(self, texts: Sequence[str], documents: Sequence[str], revision: int) -> None:
        """A reply said that these are on disk, as these documents."""
        if len(texts) != len(documents):
            raise AssertionError(f"{len(texts)} turns became {len(documents)} documents")
        if revision <= self.revision:
            raise AssertionError(f"revision {revision} after {self.revision}")
        self.revision = revision
        for text, document in zip(texts, documents, strict=True):
            self.sent[text] = True
            self.documents[text] = document
            self.revisions[text] = revision

    def deletable(self) -> list[str]:
        """Acknowledged turns that nobody has asked to delete."""
        return [text for text in self.documents if text not in self.deleted]

    def gone(self) -> set[str]:
        """Names of the documents whose deletion was acknowledged."""
        return {self.documents[text] for text, done in self.deleted.items() if done}

    @property
    def acknowledged(self) -> int:
        """Turns the server owes, or owed until it deleted them."""
        return len(self.documents)


@dataclass(frozen=True)
class Stored:
    """A turn as the server returned it."""

    document: str
    number: int
    text: str


def problems(ledgers: Sequence[Ledger], stored: Sequence[Stored]) -> list[str]:
    """What is wrong with one memory's documents, given all its writers' ledgers."""
    found: list[str] = []
    numbers = [turn.number for turn in stored]
    if numbers != sorted(set(numbers)):
        found.append("document numbers do not ascend")
    by_text: dict[str, list[Stored]] = {}
    for turn in stored:
        by_text.setdefault(turn.text, []).append(turn)
    for ledger in ledgers:
        found += _problems_of(ledger, by_text)
    strangers = set(by_text).difference(*(ledger.sent for ledger in ledgers))
    found += [f"never sent: {text}" for text in sorted(strangers)]
    return found


def _problems_of(ledger: Ledger, by_text: dict[str, list[Stored]]) -> list[str]:
    found: list[str] = []
    last = 0
    for text, acknowledged in ledger.sent.items():
        copies = by_text.get(text, [])
        if len(copies) > 1:
            found.append(f"doubled: {text} in {[copy.document for copy in copies]}")
        if acknowledged and not copies and text not in ledger.deleted:
            found.append(f"lost: {text}, acknowledged as {ledger.documents[text]}")
        if copies and ledger.deleted.get(text):
            found.append(f"deleted and still there: {text} as {copies[0].document}")
        if acknowledged and copies and copies[0].document != ledger.documents[text]:
            found.append(f"moved: {text} from {ledger.documents[text]} to {copies[0].document}")
        for copy in copies[:1]:
            if copy.number <= last:
                found.append(f"out of order: {text} at {copy.number} after {last}")
            last = copy.number
    return found
