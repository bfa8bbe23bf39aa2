"""From logits to tokens, and from tokens to whole characters."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer

from model_adapter.engine import EngineError

#: What a byte-level decoder writes for bytes that are not (yet) a character.
_INCOMPLETE = "\ufffd"
#: A character has at most 4 bytes, so that many tokens may be held back for one.
_MAX_HELD_TOKENS = 4


class Sampler:
    """Greedy at temperature 0, else temperature and top_p from its own random stream.

    A row's stream depends on its seed alone; seed 0 takes a fresh one.
    """

    def __init__(self, temperature: float, top_p: float, seed: int) -> None:
        self._temperature, self._top_p = temperature, top_p
        self._generator = torch.Generator()
        if seed:
            self._generator.manual_seed(seed)
        else:
            self._generator.seed()

    def pick(self, logits_V: torch.Tensor, best: int | None = None) -> int:
        """The next token from fp32 logits [V]. best: the likeliest one, where it is known.

        Raises EngineError where they are no numbers: there is nothing to draw from.
        """
        if self._temperature <= 0:
            return int(logits_V.argmax()) if best is None else best
        probabilities_V = torch.softmax(logits_V.float().cpu() / self._temperature, dim=-1)
        if not probabilities_V.isfinite().all():
            raise EngineError("the model's scores of tokens are no numbers")
        if 0 < self._top_p < 1:
            ordered_V, tokens_V = probabilities_V.sort(descending=True, stable=True)
            outside_V = ordered_V.cumsum(0) - ordered_V >= self._top_p
            probabilities_V[tokens_V[outside_V]] = 0.0
        return int(torch.multinomial(probabilities_V, 1, generator=self._generator))


class Detokeniser:
    """Turns a stream of tokens into text, whole characters at a time."""

    def __init__(self, tokenizer: Tokenizer, *, specials: bool) -> None:
        """specials: control tokens appear in the text as their names."""
        self._tokenizer, self._specials = tokenizer, specials
        self._ids: list[int] = []
        self._settled = self._read = 0

    def push(self, token: int) -> str:
        """Text that the token completed, perhaps none."""
        self._ids.append(token)
        return self._advance(final=False)

    def flush(self) -> str:
        """What is held back, with marks for incomplete characters."""
        return self._advance(final=True)

    def _advance(self, *, final: bool) -> str:
        # Decoded together with the tokens before them: some tokenizers drop a space
        # at the start of what they decode.
        before = self._decode(self._ids[self._settled : self._read])
        text = self._decode(self._ids[self._settled :])
        held = len(self._ids) - self._read
        if not final and text.endswith(_INCOMPLETE) and held < _MAX_HELD_TOKENS:
            return ""
        self._settled, self._read = self._read, len(self._ids)
        return text[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=not self._specials))
