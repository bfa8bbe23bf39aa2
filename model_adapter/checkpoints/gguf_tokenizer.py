"""The tokenizer that a GGUF file describes, as the tokenizer.json it was converted from.

Only byte-level BPE is rebuilt ("gpt2" in GGUF). How text is split before merging is not in the
file, only its name; the known ones are below. An unknown one is refused, because a tokenizer
that is nearly right gives a model that is nearly right.
"""

from __future__ import annotations

import json
from typing import Any

from gguf.constants import TokenType

from model_adapter.checkpoints.errors import InvalidTokenizerError, UnsupportedCheckpointError
from model_adapter.checkpoints.gguf_file import GgufFile

MAX_TOKENS = 1 << 20


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


def _split(pattern: str) -> dict[str, Any]:
    return {
        "type": "Sequence",
        "pretokenizers": [
            {
                "type": "Split",
                "pattern": {"Regex": pattern},
                "behavior": "Isolated",
                "invert": False,
            },
            _byte_level(use_regex=False),
        ],
    }


_TAIL = r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"

#: tokenizer.ggml.pre -> (pre-tokenizer, normalizer, whole words are looked up before merging).
_SPLITS: dict[str, tuple[dict[str, Any], dict[str, Any] | None, bool]] = {
    "gpt-2": (_byte_level(use_regex=True), None, False),
    # Every digit is a piece of its own, before GPT-2's pattern is applied.
    "smollm": (
        {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                _byte_level(use_regex=True),
            ],
        },
        None,
        False,
    ),
    "qwen2": (_split(_CONTRACTIONS + _TAIL % ""), {"type": "NFC"}, False),
    "llama-bpe": (_split(_CONTRACTIONS + _TAIL % "{1,3}"), None, True),
}


def _strings(file: GgufFile, key: str) -> list[str]:
    values: list[Any] = file.get(key, list)
    if len(values) > MAX_TOKENS or not all(type(value) is str for value in values):
        raise InvalidTokenizerError(f"{file.name}: {key} is not a list of at most 2^20 strings")
    return values


def _added_tokens(tokens: list[str], kinds: list[Any]) -> list[dict[str, Any]]:
    added = []
    for number, (content, kind) in enumerate(zip(tokens, kinds, strict=True)):
        if kind not in (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN):
            continue
        if not content:
            raise InvalidTokenizerError(f"special token {number} is empty")
        added.append(
            {
                "id": number,
                "content": content,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": kind != TokenType.USER_DEFINED,
            }
        )
    return added


def _merges(file: GgufFile) -> list[list[str]]:
    merges = [merge.split(" ") for merge in _strings(file, "tokenizer.ggml.merges")]
    if not all(len(pair) == 2 and all(pair) for pair in merges):
        raise InvalidTokenizerError(f"{file.name}: a merge is not two tokens with a space between")
    return merges


def tokenizer_json(file: GgufFile) -> bytes:
    """tokenizer.json of the file's tokenizer; the same bytes for the same metadata.

    Raises InvalidConfigError, InvalidTokenizerError, UnsupportedCheckpointError.
    """
    model = file.get("tokenizer.ggml.model", str)
    if model != "gpt2":
        raise UnsupportedCheckpointError(f"{file.name}: tokenizer {model!r:.40}; only gpt2 is read")
    split = file.get("tokenizer.ggml.pre", str)
    if split not in _SPLITS:
        raise UnsupportedCheckpointError(
            f"{file.name}: text splitting {split!r:.40} is none of {', '.join(_SPLITS)}"
        )
    pre_tokenizer, normalizer, ignore_merges = _SPLITS[split]
    tokens = _strings(file, "tokenizer.ggml.tokens")
    kinds: list[Any] = file.get("tokenizer.ggml.token_type", list)
    if len(kinds) != len(tokens):
        raise InvalidTokenizerError(f"{file.name}: {len(tokens)} tokens, {len(kinds)} types")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise InvalidTokenizerError(f"{file.name}: a token stands twice in the vocabulary")
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(tokens, kinds),
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": _byte_level(use_regex=True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": ignore_merges,
            "vocab": vocabulary,
            "merges": _merges(file),
        },
    }
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
