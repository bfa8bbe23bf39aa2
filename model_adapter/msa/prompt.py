"""Text formats: how documents, questions and rounds become tokens.

Rows are built from parts. Control tokens are put in by id and every text that came
from outside is tokenised with special-token parsing off, so nothing that a user
writes becomes a control token or moves a marker.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


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
    retrieval_end is matched in the generated text. The defaults are the published
    model's sentences; `system` is used by ROUTED_TEXT only.
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
    document_tokens: int = 1024
