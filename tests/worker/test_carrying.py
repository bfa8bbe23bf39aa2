"""What is carried is what was given, and nothing of it is shared."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model_adapter.carrying import Carrier

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [[1], [3, 1, 2], [1] * 9])
def test_parts_arrive_behind_each_other_with_their_places(
    dtype: torch.dtype, rows: list[int]
) -> None:
    carrier = Carrier(CPU)
    parts = [torch.randn(count, 6).to(dtype) for count in rows]
    expected, places_R = torch.cat(parts), np.arange(sum(rows)) * 2**33
    words = [part.view(torch.int16).numpy() for part in parts]
    values_RE, there_R = carrier(words, places_R, dtype)
    again_RE, _ = carrier(words, places_R, dtype)
    for part in parts:
        part.zero_()
    carrier.wipe()
    assert values_RE.dtype == dtype and torch.equal(values_RE, expected)
    assert torch.equal(again_RE, expected) and values_RE.data_ptr() != again_RE.data_ptr()
    assert there_R.tolist() == places_R.tolist()
    assert not values_RE.data_ptr() % 16
