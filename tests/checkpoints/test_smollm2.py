"""The default model's base: its tokenizer against a plain re-computation, its text against sense.

It is pulled into .data (git-ignored) when it is not there yet, as the demo does.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from model_adapter.checkpoints import default_model, gguf_model, load_engine_source
from model_adapter.checkpoints.gguf_file import GgufFile
from model_adapter.msa.config import LoadedModel
from model_adapter.msa.forward import Segment, new_row, run
from model_adapter.msa.model import Decoder
from storage.paths import DataFolder

DATA = DataFolder(Path(__file__).parents[2] / ".data")

ENGLISH = (
    "The weather in the north of the country is often cold and wet in the winter. Many people "
    "prefer to stay indoors, where they read books, watch films or cook a warm meal for their "
    "family. In the summer, however, the days are long and the beaches are full of visitors."
)


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load_engine_source("default", DATA, adapter="none")


@pytest.fixture(scope="module")
def decoder(model: LoadedModel) -> Decoder:
    return Decoder(model, torch.device("cpu"))


def _logits(decoder: Decoder, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        found = run(decoder, [Segment(new_row(decoder), ids)], every_token=True).logits
    assert found is not None
    return found


def _perplexity(decoder: Decoder, ids: list[int]) -> float:
    targets = torch.tensor(ids[1:])
    return float(functional.cross_entropy(_logits(decoder, ids)[:-1], targets).exp())


def test_what_it_is(model: LoadedModel) -> None:
    config = model.config
    assert (config.num_layers, config.hidden_size, config.vocab_size) == (30, 576, 49152)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (9, 3, 64)
    assert (config.rope_theta, config.rms_norm_eps) == (100000.0, 1e-5)
    assert config.tie_word_embeddings
    assert config.msa.routed_layers == tuple(range(22, 30))
    assert (model.compute_dtype, model.eos_ids) == ("bf16", (2,))
    template = model.template
    assert (template.turn_start, template.turn_end, template.reference_end) == ((1,), (2,), (5,))
    assert template.retrieval_end == "<issue_closed>"
    assert all(torch.isfinite(tensor.float()).all() for tensor in model.weights.values())


#: Written down from the vocabulary and the merges; the digits of a number are apart.
KNOWN = {
    "Hello, world!": ["Hello", ",", "Ġworld", "!"],
    "In 2024": ["In", "Ġ", "2", "0", "2", "4"],
    "I've spent $12": ["I", "'ve", "Ġspent", "Ġ$", "1", "2"],
}


def test_known_encodings(model: LoadedModel) -> None:
    for text, tokens in KNOWN.items():
        assert model.tokenizer.encode(text, add_special_tokens=False).tokens == tokens


def _merged(piece: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """Byte-pair encoding of one piece, straight from its definition."""
    parts = list(piece)
    while len(parts) > 1:
        pairs = [
            (ranks.get(pair, len(ranks)), at) for at, pair in enumerate(itertools.pairwise(parts))
        ]
        rank, at = min(pairs)
        if rank == len(ranks):
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def test_merges_against_a_plain_recomputation(model: LoadedModel) -> None:
    with GgufFile(default_model.cached_path(DATA)) as file:
        tokens: list[str] = file.get("tokenizer.ggml.tokens", list)
        merges: list[str] = file.get("tokenizer.ggml.merges", list)
    ids = {token: number for number, token in enumerate(tokens)}
    ranks = {(pair[0], pair[1]): n for n, pair in enumerate(m.split(" ") for m in merges)}
    words = (ENGLISH + " extraordinary Grüße tokenizer-specific straightforwardly!").split()
    for word in words:
        split = model.tokenizer.pre_tokenizer.pre_tokenize_str(" " + word)
        expected = [ids[part] for piece, _ in split for part in _merged(piece, ranks)]
        assert model.tokenizer.encode(" " + word, add_special_tokens=False).ids == expected, word


def test_round_trip(model: LoadedModel) -> None:
    for text in (ENGLISH, "Grüße aus 東京 🙂\n\n\tx  y", json.dumps({"a": [1, 2.5]}), "ﬁn\u200b"):
        ids = model.tokenizer.encode(text, add_special_tokens=False).ids
        assert model.tokenizer.decode(ids, skip_special_tokens=False) == text


def test_ordinary_english_is_not_surprising(model: LoadedModel, decoder: Decoder) -> None:
    ids = [0, *model.tokenizer.encode(ENGLISH, add_special_tokens=False).ids]
    assert 4 < _perplexity(decoder, ids) < 16


def test_without_undoing_the_rope_order_english_is_surprising(
    model: LoadedModel, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [0, *model.tokenizer.encode(ENGLISH, add_special_tokens=False).ids]
    right = _perplexity(decoder, ids)
    monkeypatch.setattr(gguf_model, "undo_rope_order", lambda values, heads: values)
    spoilt = load_engine_source("default", DATA, adapter="none")
    wrong = Decoder(spoilt, torch.device("cpu"))
    assert _perplexity(wrong, ids) > 2 * right


def test_it_completes_and_answers(model: LoadedModel, decoder: Decoder) -> None:
    prompts = {
        "The capital of France is": 3,
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n": 9,
    }
    for prompt, tokens in prompts.items():
        ids = model.tokenizer.encode(prompt, add_special_tokens=False).ids
        for _ in range(tokens):
            ids.append(int(_logits(decoder, ids)[-1].argmax()))
        assert "Paris" in model.tokenizer.decode(ids)
