"""Voting tokens of many questions as one matrix, in the type that keys are multiplied in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from model_adapter.msa.kernels.keys import INT8_MAX, KeyFormat, RoutingKeys

#: A matrix unit takes no fewer rows.
_FEWEST_TOKENS = 16
#: Rows multiplied at once by one program, at most: more only grow its registers. A question
#: of more tokens comes in pieces of so many.
MOST_ROWS = 128
#: The second part of an integer row counts in 1/254 of the first one's unit.
LOW_UNIT = 1.0 / (2 * INT8_MAX)


def padded_tokens(counts: Iterable[int]) -> int:
    """Rows of one question, for questions of so many tokens."""
    longest = max(_FEWEST_TOKENS, *counts)
    if longest > MOST_ROWS:
        return -(-longest // MOST_ROWS) * MOST_ROWS
    return 1 << (longest - 1).bit_length()


@dataclass(frozen=True, eq=False)
class Rows:
    """Every question padded to `tokens` rows: a power of two, or whole pieces of MOST_ROWS.

    A row is scale * (high + low / 254) for integer keys and high + low (scale 1) for
    float ones: two parts hold 16 bits where one holds 8. bias_R: 0, or minus infinity for
    padding, which never wins.
    """

    tokens: int
    integer: bool
    high_RE: torch.Tensor
    low_RE: torch.Tensor
    scale_R: torch.Tensor
    bias_R: torch.Tensor

    @classmethod
    def of(cls, questions: Sequence[torch.Tensor], keys: RoutingKeys) -> Rows:
        """questions: fp32 [Q, E] each, at least one token, of the memories in order."""
        tokens = padded_tokens(question.shape[0] for question in questions)
        device, width = keys.values_CE.device, keys.width
        rows_RE = torch.zeros(len(questions) * tokens, width, device=device)
        bias_R = torch.full((len(questions) * tokens,), -torch.inf, device=device)
        for index, question_QE in enumerate(questions):
            first = index * tokens
            rows_RE[first : first + question_QE.shape[0]] = question_QE
            bias_R[first : first + question_QE.shape[0]] = 0
        return cls.padded(tokens, rows_RE, bias_R, keys)

    @classmethod
    def padded(
        cls, tokens: int, rows_RE: torch.Tensor, bias_R: torch.Tensor, keys: RoutingKeys
    ) -> Rows:
        """Of rows that are padded already: zeros and a bias of minus infinity."""
        if keys.format is KeyFormat.FLOAT:
            return cls._floats(tokens, rows_RE, bias_R, keys.values_CE.dtype)
        return cls._integers(tokens, rows_RE, bias_R)

    @classmethod
    def _floats(
        cls, tokens: int, rows_RE: torch.Tensor, bias_R: torch.Tensor, dtype: torch.dtype
    ) -> Rows:
        high_RE = rows_RE.to(dtype)
        low_RE = (rows_RE - high_RE.float()).to(dtype)
        return cls(tokens, False, high_RE, low_RE, torch.ones_like(bias_R), bias_R)

    @classmethod
    def _integers(cls, tokens: int, rows_RE: torch.Tensor, bias_R: torch.Tensor) -> Rows:
        tiny = torch.finfo(torch.float32).tiny
        scale_R = rows_RE.abs().amax(dim=1).clamp_min(tiny) / INT8_MAX
        units_RE = rows_RE / scale_R[:, None]
        high_RE = units_RE.round()
        low_RE = ((units_RE - high_RE) / LOW_UNIT).round()
        parts = (high_RE.to(torch.int8), low_RE.to(torch.int8))
        return cls(tokens, True, *parts, scale_R, bias_R)

    def values(self) -> torch.Tensor:
        """fp32 [R, E] that the parts stand for."""
        unit = LOW_UNIT if self.integer else 1.0
        return (self.high_RE.float() + self.low_RE.float() * unit) * self.scale_R[:, None]
