"""A layout as a worker says it."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from model_adapter.v1 import model_adapter_pb2 as pb
from storage.layout import KVLayout, LayoutError
from tests.support.blocks import LAYOUTS, SHARED


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_is_read_as_it_was_written(layout: KVLayout) -> None:
    assert KVLayout.of(pb.KVLayout(**asdict(layout))) == layout


def test_a_dtype_that_is_not_known_is_refused() -> None:
    message = pb.KVLayout(**asdict(SHARED) | {"dtype": "fp8"})
    with pytest.raises(LayoutError, match="unknown dtype 'fp8'; known are bf16, fp32"):
        KVLayout.of(message)
