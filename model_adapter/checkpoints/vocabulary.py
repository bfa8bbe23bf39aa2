"""Checks of a tokenizer, and the chat format that its special tokens allow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tokenizers import Tokenizer

from model_adapter.checkpoints.errors import InvalidTokenizerError
from model_adapter.checkpoints.values import read_bytes
from model_adapter.msa.prompt import Answering, Template

MAX_TOKENIZER_BYTES = 64 << 20

TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
REFERENCE_END = "<|object_ref_end|>"
RETRIEVAL_END = "<End-of-Retrieve>"

#: Tokens that can stand for a control token a base lacks, best first. Each is in some base's
#: vocabulary and unused in its chat format, so that no embedding row has to be added.
_TURN_STARTS = (TURN_START, "<|begin_of_text|>", "<s>", "<|endoftext|>")
_TURN_ENDS = (TURN_END, "<|eot_id|>", "<|end_of_text|>", "</s>", "<|endoftext|>")
_REFERENCE_ENDS = (REFERENCE_END, "<file_sep>", "<|reserved_special_token_0|>", "<unk>")
_RETRIEVAL_ENDS = ("<issue_closed>", "<|reserved_special_token_1|>")

#: Share of the question's words in the ranking, with trained routers and without: what found
#: most where it was measured (docs/default-model.md).
TRAINED_LEXICAL_WEIGHT = 0.4
UNTRAINED_LEXICAL_WEIGHT = 0.6
#: Probability from which an adapter, which was trained to decline, does (docs/default-model.md).
TRAINED_UNKNOWN_SHARE = 0.1
#: Documents that are shown, with an adapter and without, and the tokens of them behind which an
#: adapter of that size is shown no further one: what helped most (docs/default-model.md).
TRAINED_DOCUMENTS = 8
UNTRAINED_DOCUMENTS = 3
TRAINED_ENOUGH_TOKENS = 512


def parse_tokenizer(content: bytes, name: str) -> Tokenizer:
    """A tokenizer from the bytes of a tokenizer.json. Raises InvalidTokenizerError."""
    try:
        tokenizer = Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises bare Exception, nothing narrower
        raise InvalidTokenizerError(f"{name} is not a tokenizer: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def read_tokenizer(path: Path) -> tuple[Tokenizer, bytes]:
    """The tokenizer in a tokenizer.json, and that file's bytes.

    Raises CheckpointNotFoundError, CorruptFileError, InvalidTokenizerError.
    """
    content = read_bytes(path, MAX_TOKENIZER_BYTES)
    return parse_tokenizer(content, path.name), content


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises InvalidTokenizerError when a token's id has no row in the embedding."""
    ids = tokenizer.get_vocab(with_added_tokens=True).values()
    highest = max(ids, default=-1)
    if not 0 <= highest < vocab_size:
        raise InvalidTokenizerError(
            f"the tokenizer's highest id is {highest}, the model has {vocab_size} embeddings"
        )


def _first(tokenizer: Tokenizer, names: tuple[str, ...]) -> tuple[int, ...]:
    for name in names:
        token = tokenizer.token_to_id(name)
        if token is not None:
            return (token,)
    return ()


def _plain(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, add_special_tokens=False).ids)


def published_template(tokenizer: Tokenizer) -> Template:
    """The published models' format. Raises InvalidTokenizerError without its control tokens."""
    for name in (TURN_START, TURN_END, REFERENCE_END):
        if tokenizer.token_to_id(name) is None:
            raise InvalidTokenizerError(f"the tokenizer has no token {name}")
    return _template(tokenizer, Answering.INTERLEAVE)


def base_template(tokenizer: Tokenizer, *, trained: bool) -> Template:
    """A format for a base that was not trained to name documents; trained: its routers were.

    Control tokens that it lacks get an encoding of existing tokens: a special token that its
    chat format does not use or, failing that, the marker spelt out.
    Raises InvalidTokenizerError when not even a turn can be opened and closed.
    """
    # Only the question itself votes: the published sentences around it say nothing to a base,
    # and would drown a short question in the mean over voting tokens.
    return replace(
        _template(tokenizer, Answering.ROUTED_TEXT),
        ask="",
        return_documents="",
        system="You answer questions about the given text. Answer with a few words of it.",
        documents_after="\nQuestion: ",
        documents=TRAINED_DOCUMENTS if trained else UNTRAINED_DOCUMENTS,
        enough_tokens=TRAINED_ENOUGH_TOKENS if trained else 0,
        unknown="I don't know.",
        unknown_share=TRAINED_UNKNOWN_SHARE if trained else 0.0,
        lexical_weight=TRAINED_LEXICAL_WEIGHT if trained else UNTRAINED_LEXICAL_WEIGHT,
    )


def _template(tokenizer: Tokenizer, answering: Answering) -> Template:
    start = _first(tokenizer, _TURN_STARTS)
    end = _first(tokenizer, _TURN_ENDS)
    if not (start and end):
        raise InvalidTokenizerError("the tokenizer has no token that opens or ends a turn")
    reference_end = _first(tokenizer, _REFERENCE_ENDS) or _plain(tokenizer, REFERENCE_END)
    retrieval_end = RETRIEVAL_END
    if tokenizer.token_to_id(REFERENCE_END) is None:
        names = (name for name in _RETRIEVAL_ENDS if tokenizer.token_to_id(name) is not None)
        retrieval_end = next(names, RETRIEVAL_END)
    if not reference_end:
        raise InvalidTokenizerError(f"the tokenizer cannot spell {REFERENCE_END}")
    return Template(
        answering=answering,
        turn_start=start,
        turn_end=end,
        reference_end=reference_end,
        head=start + _plain(tokenizer, "user\n"),
        tail=end + _plain(tokenizer, "\n"),
        retrieval_end=retrieval_end,
    )
