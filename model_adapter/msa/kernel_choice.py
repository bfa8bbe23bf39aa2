"""Whether routing goes by kernels on a device, in which precision, and why."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import torch

from model_adapter.msa import kernels
from model_adapter.msa.config import TORCH_DTYPE, ModelConfig
from model_adapter.msa.kernel_pass import why_not
from model_adapter.msa.kernels import Batch, Kernels, KeyFormat, KeyStorage, ResidentKeys, Rows
from model_adapter.msa.kernels.rows import MOST_ROWS, padded_tokens
from model_adapter.msa.kernels.score import fused_available
from model_adapter.msa.pass_boards import AHEAD

log = logging.getLogger(__name__)

#: Tokens that a question is padded to, at least.
_FEWEST = padded_tokens([1])
#: What is tried: few rows, as many as a program takes, and a question in pieces.
_QUESTIONS, _TOKENS = 8, (9, 130)
#: Relative to the largest score: far above rounding, far below a wrong product.
_TOLERANCE = 1e-3


class RoutingKeyChoice(StrEnum):
    """How a worker is asked to hold routing keys on its device.

    AUTO: as they are stored on a GPU; by the formula on a CPU. TWO_STAGE: 4 bits on the
    device, and the exact keys in host RAM to score the best again.
    """

    AUTO = "auto"
    FLOAT = "float"
    INT8 = "int8"
    INT4 = "int4"
    TWO_STAGE = "two-stage"


@dataclass(frozen=True)
class RoutingChoice:
    """kernels and storing are None where routing goes by the formula. reason: for people."""

    kernels: Kernels | None
    storing: KeyStorage | None
    reason: str


def choose(
    wanted: RoutingKeyChoice, config: ModelConfig, dtype: str, device: torch.device
) -> RoutingChoice:
    """Kernels on a GPU that is found to compute right; their twin where a precision is asked
    for without one; else the formula."""
    against = why_not(config.msa, config.head_dim)
    if against:
        return RoutingChoice(None, None, f"routing by the formula: {against}")
    if wanted is RoutingKeyChoice.AUTO and device.type != "cuda":
        return RoutingChoice(None, None, "routing by the formula: no GPU")
    storing = _storage(wanted, config.head_dim)
    held = f"routing keys held as {storing.format.value}" + (
        ", exact ones in host RAM" if storing.exact else ""
    )
    if not fused_available(device):
        lacking = "no triton" if device.type == "cuda" else "no GPU"
        return RoutingChoice(Kernels.TWIN, storing, f"routing in plain torch: {lacking}; {held}")
    kind = (storing, config.num_kv_heads * config.head_dim, TORCH_DTYPE[dtype], device)
    wrong = check(*kind)
    if wrong:
        log.warning("the routing kernels are not used: %s", wrong)
        return RoutingChoice(
            Kernels.TWIN, storing, f"routing in plain torch: the kernels failed; {held}"
        )
    warm(*kind)
    return RoutingChoice(Kernels.FUSED, storing, f"routing by Triton kernels; {held}")


def check(storing: KeyStorage, width: int, dtype: torch.dtype, device: torch.device) -> str:
    """Runs the kernels on a small memory beside their twin; what is wrong, empty when nothing."""
    generator = torch.Generator().manual_seed(0)
    lengths = [1 + n % 5 for n in range(43)]  # one tile and a bit
    offsets_N1 = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    keys_LCE = torch.randn(1, sum(lengths), width, generator=generator).to(dtype)
    memory = ResidentKeys.of(offsets_N1, keys_LCE, storing, device)
    batch = Batch.of([memory], [_QUESTIONS])
    for tokens in _TOKENS:
        questions = torch.randn(_QUESTIONS, tokens, width, generator=generator).to(device)
        wrong = _compared(batch, Rows.of(list(questions), batch.first))
        if wrong:
            return wrong
    return ""


def warm(storing: KeyStorage, width: int, dtype: torch.dtype, device: torch.device) -> None:
    """Compiles every kernel that routing will ask for, so that no query waits for it. Later
    starts find them in Triton's cache."""
    offsets_N1 = np.arange(9, dtype=np.int64)
    keys_LCE = torch.ones(1, 8, width, dtype=dtype)
    memory = ResidentKeys.of(offsets_N1, keys_LCE, storing, device)
    tokens = _FEWEST
    while tokens <= MOST_ROWS:
        for questions in (1, 2, MOST_ROWS // tokens + 1):
            batch = Batch.of([memory], [questions])
            asked = [torch.ones(tokens, width, device=device)] * questions
            batch.score(0, Rows.of(asked, batch.first), fused=True)
        tokens *= 2
    kernels.best(torch.zeros(1, AHEAD, device=device), AHEAD, fused=True)
    if storing.exact:  # to score the best again
        warm(KeyStorage(group=storing.group), width, dtype, device)


def _compared(batch: Batch, rows: Rows) -> str:
    twin = batch.score(0, rows, fused=False)
    try:
        fused = batch.score(0, rows, fused=True)
        best = kernels.read_keys(kernels.best_keys(batch.plan, fused, 16, fused=True))
    except Exception as error:  # noqa: BLE001  # a compiler's or driver's own; the twin goes on
        return f"{type(error).__name__}: {error}"
    difference = float((fused - twin).abs().max() / twin.abs().max())
    if not difference <= _TOLERANCE:
        return f"scores differ from the twin's by {difference:.2g} of the largest"
    again = kernels.read_keys(kernels.best_keys(batch.plan, fused, 16, fused=False))
    same = all((one == other).all() for (one, _), (other, _) in zip(best, again, strict=True))
    return "" if same else "the best documents are others"


def _storage(wanted: RoutingKeyChoice, head_dim: int) -> KeyStorage:
    formats = {RoutingKeyChoice.INT8: KeyFormat.INT8, RoutingKeyChoice.INT4: KeyFormat.INT4}
    exact = wanted is RoutingKeyChoice.TWO_STAGE
    to = KeyFormat.INT4 if exact else formats.get(wanted, KeyFormat.FLOAT)
    return KeyStorage(to, head_dim, exact)
