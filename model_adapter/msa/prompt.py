"""Text formats: how documents, questions and rounds become tokens.

Rows are built from parts. Control tokens are put in by id and every text that came
from outside is tokenised with special-token parsing off, so nothing that a user
writes becomes a control token or moves a marker.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from tokenizers import Tokenizer


class Answering(StrEnum):
    """How an answer is made.

    INTERLEAVE: the model names documents, their text is put in, in bounded rounds
    (the published MSA models are trained to do so). ROUTED_TEXT: the text of the
    routed documents, best first, goes before the question in the base's own chat
    format.
    """

    INTERLEAVE = "interleave"
    ROUTED_TEXT = "routed_text"


@dataclass(frozen=True)
class Template:
    """Token ids of the control tokens, and the sentences around a question.

    Every control is a tuple of ids, because a base that lacks one may stand it for a
    short sequence. head opens the cached prefix and tail ends a user turn.
    retrieval_end is matched in the generated text. The sentences default to the
    published model's. ROUTED_TEXT only: `system` opens the chat (none when empty),
    `documents_before` and `documents_after` surround the routed documents' texts, of
    which at most document_tokens are put in (INTERLEAVE: per round), of the best `documents`
    (0: of the model's top k) and of none behind those that have enough_tokens together (0: no
    such bound), unless a request's top_k says how many; `unknown` is the answer
    when no document could be put in (empty: the model answers without), and an answer begins
    with its first token when that is given a probability of unknown_share (0: when it is the
    choice anyway). lexical_weight: share of the question's words in a ranking, 0 for routing
    alone.
    """

    answering: Answering
    turn_start: tuple[int, ...]
    turn_end: tuple[int, ...]
    reference_end: tuple[int, ...]
    head: tuple[int, ...]
    tail: tuple[int, ...]
    retrieval_end: str = "<End-of-Retrieve>"
    ask: str = "\nPlease answer the question based on the above historical document information\n\n"
    return_documents: str = "\nPlease return all documents related to the question"
    question_again: str = "The user's question is: "
    answer_mark: str = "The answer to the question is:"
    system: str = ""
    documents_before: str = ""
    documents_after: str = ""
    document_tokens: int = 1024
    documents: int = 0
    enough_tokens: int = 0
    unknown: str = ""
    unknown_share: float = 0.0
    lexical_weight: float = 0.0


@dataclass(frozen=True)
class Prompt:
    """A row's tokens, and which of them vote in routing."""

    ids: list[int]
    votes: list[bool]


@dataclass(frozen=True)
class Part:
    """A run of tokens that vote alike."""

    ids: Sequence[int]
    votes: bool = False


def join(parts: Sequence[Part]) -> Prompt:
    """Parts in order."""
    ids = [token for part in parts for token in part.ids]
    votes = [part.votes for part in parts for _ in part.ids]
    return Prompt(ids, votes)


class PromptBuilder:
    """Makes token rows of one model's texts."""

    def __init__(self, tokenizer: Tokenizer, template: Template) -> None:
        self.template = template
        self._tokenizer = _text_only(tokenizer)

    @property
    def tokenizer(self) -> Tokenizer:
        """Reads all control strings as the characters they are."""
        return self._tokenizer

    def text(self, text: str) -> list[int]:
        """Tokens of a text in which nothing is a control token."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, control tokens left out."""
        return str(self._tokenizer.decode(list(ids)))

    def document(self, number: int, text: str) -> list[int]:
        """A document as it is encoded: its number before and after its text."""
        t = self.template
        return [*t.turn_start, *self.text(f"[{number}]. {text}[{number}]"), *t.turn_end]

    def question(self, question: str) -> list[Part]:
        """The first round's row behind the cached head: the question votes, all of it."""
        t = self.template
        asked = self.text(f"{t.ask}{question}{t.return_documents}\n")
        return [Part(asked, votes=True), Part([*t.tail, *t.turn_start])]

    def question_of_later_round(self, question: str) -> list[Part]:
        """The same tokens; as in the published loop, the last line break does not vote."""
        t = self.template
        voting = len(self.text(f"{t.ask}{question}{t.return_documents}"))
        first, controls = self.question(question)
        return [Part(first.ids[:voting], votes=True), Part(first.ids[voting:]), controls]

    def question_again(self, question: str) -> list[int]:
        """The segment that opens the answer once retrieval is over."""
        t = self.template
        return [*t.turn_start, *self.text(f"{t.question_again}{question}\n"), *t.reference_end]

    def cited(self, number: int, text: str) -> list[int]:
        """A document's text as it is put before the model."""
        return self.text(f"[{number}]. {text}\n")

    def chat_opening(self, *, documents: bool = True) -> list[int]:
        """What every chat turn begins with: up to the first document, if there will be any."""
        t = self.template
        ids: list[int] = []
        if t.system:
            ids += [*t.turn_start, *self.text(f"system\n{t.system}"), *t.turn_end, *self.text("\n")]
        before = t.documents_before if documents else ""
        return [*ids, *t.turn_start, *self.text("user\n" + before)]

    def chat(self, documents: Sequence[Sequence[int]], question: str) -> list[int]:
        """A chat turn with documents' tokens before the question, open for the answer."""
        t = self.template
        ids = self.chat_opening(documents=bool(documents))
        for document in documents:
            ids += document
        after = t.documents_after if documents else ""
        ids += [*self.text(after + question), *t.turn_end, *self.text("\n")]
        return [*ids, *t.turn_start, *self.text("assistant\n")]


def _text_only(tokenizer: Tokenizer) -> Tokenizer:
    """A copy that reads control strings as the characters they are.

    The library leaves alone only tokens marked special, and checkpoints leave some
    bracketed control tokens unmarked; here all of them are.
    """
    raw = json.loads(tokenizer.to_str())
    for token in raw.get("added_tokens", []):
        if re.fullmatch(r"<.*>|\[.*\]", token["content"], flags=re.DOTALL):
            token["special"] = True
    copy = Tokenizer.from_str(json.dumps(raw))
    copy.encode_special_tokens = True
    copy.no_padding()
    copy.no_truncation()
    return copy
