"""Texts and markers as the published implementation makes them.

Here, and only here, text is parsed for control strings, because the golden vectors were
made so; the product builds its rows from parts (model_adapter.msa.prompt).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

START, END, REFERENCE_END = "<|im_start|>", "<|im_end|>", "<|object_ref_end|>"
PAD = "<|endoftext|>"
RETRIEVAL_END = "<End-of-Retrieve>"
REGENERATE = "<regenerate>"
OPENING = "\nPlease answer the question based"
ASK = f"{OPENING} on the above historical document information\n\n"
RETURN = "\nPlease return all documents related to the question"
ANSWER = "The answer to the question is:"
#: Characters of a response without any marker after which the reference stops retrieval.
LONG_RESPONSE = 1000

_NAMED = re.compile(r"\[(\d+)\]")


@dataclass(frozen=True)
class ReferenceRow:
    """Tokens and markers ("doc_ids"); 0 votes."""

    ids: list[int]
    markers: list[int]


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokens, control strings becoming control tokens."""
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Text with control tokens by their names."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False))


def document_ids(tokenizer: Tokenizer, number: int, text: str) -> list[int]:
    """A document as stage 1 reads it."""
    return encode(tokenizer, f"{START}[{number}]. {text}[{number}]{END}")


def prompt_row(tokenizer: Tokenizer, prompt: str) -> ReferenceRow:
    """A question's first row, or the row of a `<regenerate>` prompt."""
    if REGENERATE in prompt:
        return _regenerated(tokenizer, prompt.split(REGENERATE, 1)[1])
    asked = encode(tokenizer, f"{ASK}{prompt}{RETURN}\n")
    tail, start = encode(tokenizer, f"{END}\n"), encode(tokenizer, START)
    return ReferenceRow(
        [*asked, *tail, *start], [0] * len(asked) + [-2] * len(tail) + [-1] * len(start)
    )


def _regenerated(tokenizer: Tokenizer, text: str) -> ReferenceRow:
    ids = encode(tokenizer, text)
    markers = [-1] * len(ids)
    anchor = text.find(RETURN.strip())
    if anchor >= 0:
        _mark(tokenizer, markers, text, 0, anchor + len(RETURN.strip()))
    latest = text.rfind(f"]{REFERENCE_END}[")
    if latest >= 0:
        first = latest + len(f"]{REFERENCE_END}")
        stop = text.find(REFERENCE_END, first)
        _mark(tokenizer, markers, text, first, len(text) if stop < 0 else stop)
    return ReferenceRow(ids, markers)


def _mark(tokenizer: Tokenizer, markers: list[int], text: str, first: int, stop: int) -> None:
    start = len(encode(tokenizer, text[:first])) if first else 0
    for place in range(start, min(len(encode(tokenizer, text[:stop])), len(markers))):
        markers[place] = 0


def question_of(text: str) -> str:
    """The question, cut out of a row's text."""
    _, _, rest = text.rpartition("historical document information\n\n")
    return rest.split(RETURN, 1)[0]


def question_segment(text: str) -> str:
    """What stage 3 puts in for a row with this text."""
    return f"{START}The user's question is: {question_of(text)}\n{REFERENCE_END}"


def fetched(response: str, text: str, documents: Sequence[str]) -> str:
    """What state 2 puts in: the question once retrieval is over, else documents."""
    if RETRIEVAL_END in response:
        return question_segment(text)
    named = sorted({int(digits) for digits in _NAMED.findall(response)})
    texts = [f"[{n}]. {documents[n]}\n" for n in named if n < len(documents)]
    return "".join(texts) + REFERENCE_END


def cut(generated: str) -> str:
    """The driver's part of a returned text."""
    first = generated.find(OPENING)
    if first < 0:
        return generated.replace(PAD, "")
    second = generated.find(OPENING, first + len(OPENING))
    return generated[first : second if second >= 0 else len(generated)].replace(PAD, "")


def regenerate(post: str) -> str | None:
    """The next round's prompt, or None when the response is final."""
    if post.endswith(REFERENCE_END) and ANSWER not in post:
        return f"{REGENERATE}{post}"
    return None
