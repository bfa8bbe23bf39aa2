"""A memory with its forks, and what each of them must hold. No I/O here.

Writers of a memory go on while it is forked, so what a fork must hold is known by revision: of
its parent's turns those acknowledged with the fork's revision or before, and none of later ones.
What was deleted before the fork was begun is not in it; what is deleted after it was made is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tests.fault.ledger import Ledger


@dataclass
class Root:
    """The memory that writers append to."""

    memory: str
    writers: list[Ledger]

    def ledgers(self) -> list[Ledger]:
        """What it must hold."""
        return self.writers

    def past(self) -> list[int]:
        """Revisions that it can be forked at."""
        return [revision for ledger in self.writers for revision in ledger.revisions.values()]


class Fork:
    """A memory made of another one. One client alone appends to it."""

    def __init__(self, memory: str, parent: Branch) -> None:
        """Takes down what was deleted of the parent before the call that makes the fork."""
        self.memory = memory
        self.parent = parent
        self.revision = 0
        self.own = Ledger(memory, memory)
        #: Deletions of what it has of its parent. False: it may be there or not.
        self.deleted = {text: True for text, done in _deletions(parent).items() if done}
        self._sent: set[str] = set()

    def made(self, revision: int) -> None:
        """It is there, as of its parent's revision."""
        self.revision = self.own.revision = revision
        self._sent = {text for ledger in self.parent.ledgers() for text in ledger.sent}
        self.deleted = dict.fromkeys(_deletions(self.parent), False) | self.deleted

    def ledgers(self) -> list[Ledger]:
        """What it must hold, its own ledger last."""
        return [*map(self._inherited, self.parent.ledgers()), self.own]

    def _inherited(self, ledger: Ledger) -> Ledger:
        def shown(text: str) -> bool:
            return text in self._sent and ledger.revisions.get(text, 0) <= self.revision

        here, there = f"memories/{self.memory}/", f"memories/{ledger.memory}/"
        documents = {
            text: document.replace(there, here)
            for text, document in ledger.documents.items()
            if shown(text)
        }
        return Ledger(
            self.memory,
            ledger.writer,
            sent={text: acknowledged for text, acknowledged in ledger.sent.items() if shown(text)},
            documents=documents,
            revisions={text: ledger.revisions[text] for text in documents},
            deleted={text: done for text, done in self.deleted.items() if text in documents},
            revision=self.revision,
        )

    def past(self) -> list[int]:
        """Revisions that it can be forked at, or go back to: none of them is 0, of nothing."""
        return [one for one in (self.revision, *self.own.revisions.values()) if one]

    def deletable(self) -> dict[str, str]:
        """Documents by turn that are there for certain."""
        return {
            text: ledger.documents[text] for ledger in self.ledgers() for text in ledger.deletable()
        }

    def delete(self, text: str, *, done: bool) -> None:
        """The turn is to be deleted; done: a reply acknowledged it."""
        deletions = self.own.deleted if text in self.own.sent else self.deleted
        deletions[text] = done

    def added_after(self, revision: int) -> dict[str, str]:
        """Documents by turn that going back to the revision deletes."""
        return {
            text: self.own.documents[text]
            for text in self.own.deletable()
            if self.own.revisions[text] > revision
        }


Branch = Root | Fork


@dataclass
class Family:
    """doubtful: forks whose client was not told whether they were made."""

    root: Root
    forks: list[Fork] = field(default_factory=list)
    doubtful: list[Fork] = field(default_factory=list)
    #: Forks begun so far, which gives the next one its name.
    begun: int = 0

    def branches(self) -> list[Branch]:
        """All memories that must be there."""
        return [self.root, *self.forks]

    def begin(self, parent: Branch) -> Fork:
        """A fork that is about to be made."""
        self.begun += 1
        return Fork(f"{self.root.memory}-f{self.begun}", parent)

    def settle(self, made: Mapping[str, int]) -> None:
        """Decides on the doubtful ones. made: revisions that memories which are there were
        forked at, by memory."""
        for fork in self.doubtful:
            if fork.memory in made:
                fork.made(made[fork.memory])
                self.forks.append(fork)
        self.doubtful = []


def _deletions(branch: Branch) -> dict[str, bool]:
    together: dict[str, bool] = {}
    for ledger in branch.ledgers():
        together |= ledger.deleted
    return together
