"""What encoding allocates: bounded by a batch's tokens, and nothing of the vocabulary's width."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model_adapter.engine import DocumentText
from model_adapter.msa import encode
from tests.support.tiny_msa import tiny_engine


class Allocations(TorchDispatchMode):
    """Elements and shapes of everything that an operation makes within it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch gives it no types
        self.elements = 0
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.elements = max(self.elements, made.numel())
            self.shapes.add(tuple(made.shape))
        return made


@pytest.mark.parametrize("batch_tokens", [128, 512])
def test_encoding_allocates_by_the_batch_and_makes_no_logits(
    monkeypatch: pytest.MonkeyPatch, batch_tokens: int
) -> None:
    monkeypatch.setattr(encode, "BATCH_TOKENS", batch_tokens)
    engine = tiny_engine()
    config = engine._model.decoder.config
    words = "The captain sold the boat in the old city. "
    texts = [DocumentText(n, words * (1 + n % 7)) for n in range(1, 60)]
    with Allocations() as made:
        encoded = engine.encode(texts)
    tokens = sum(block.tokens for block in encoded.blocks)
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    widest = max(2 * config.intermediate_size, queries + 3 * keys, config.hidden_size)
    assert tokens > 3 * batch_tokens
    assert batch_tokens * widest // 4 < made.elements <= batch_tokens * widest
    assert not [shape for shape in made.shapes if config.vocab_size in shape[-1:]]
