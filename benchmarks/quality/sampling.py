"""A part of a bank that fits a small machine, drawn with a seed, the same for every row.

Whole conversations are taken in a drawn order while they fit. A bank without conversations
keeps the gold documents of the drawn questions, and others in a drawn order while they fit.
"""

from __future__ import annotations

import random
from collections.abc import Collection

from benchmarks.quality.banks import Bank, BankError, Scope


def draw(
    bank: Bank, *, questions: int, characters: int, seed: int, left_out: Collection[str] = ()
) -> Bank:
    """The drawn part, in the bank's order.

    questions: at most, 0 for all. characters: of the corpus at most (one conversation, or the
    gold documents, may pass it), 0 for all. left_out: conversations that do not take part.
    Raises BankError for one that is not there.
    """
    if missing := set(left_out) - bank.scopes.keys():
        raise BankError(f"{bank.name} has no conversation {min(missing)!r}")
    rng = random.Random(seed)
    names = [name for name in bank.scopes if name not in left_out]
    if characters and len(names) > 1:
        names = _conversations(bank, rng.sample(names, len(names)), characters)
    asked = [question for name in names for question in bank.scopes[name].questions]
    if questions and questions < len(asked):
        places = sorted(rng.sample(range(len(asked)), questions))
        asked = [asked[place] for place in places]
    drawn: dict[str, Scope] = {}
    for name in sorted(names):
        kept = [question for question in asked if question.scope == name]
        if kept:
            drawn[name] = Scope(bank.scopes[name].documents, kept)
    if characters and len(drawn) == 1:
        drawn = {name: _trimmed(scope, characters, rng) for name, scope in drawn.items()}
    return Bank(bank.name, drawn)


def _conversations(bank: Bank, order: list[str], characters: int) -> list[str]:
    taken: list[str] = []
    for name in order:
        size = sum(len(document.text) for document in bank.scopes[name].documents)
        if not taken or size <= characters:
            taken.append(name)
            characters -= size
    return taken


def _trimmed(scope: Scope, characters: int, rng: random.Random) -> Scope:
    gold = {name for question in scope.questions for name in question.gold}
    left = characters - sum(len(d.text) for d in scope.documents if d.id in gold)
    kept = set(gold)
    for document in rng.sample(scope.documents, len(scope.documents)):
        if document.id not in gold and len(document.text) <= left:
            kept.add(document.id)
            left -= len(document.text)
    return Scope([document for document in scope.documents if document.id in kept], scope.questions)
