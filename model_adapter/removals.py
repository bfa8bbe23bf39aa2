"""Documents that are deleted, and whose records the worker may still find in the store."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from model_adapter.errors import FieldError
from model_adapter.v1 import model_adapter_pb2 as pb

_FIELD = "memory.removed"


@dataclass(frozen=True, eq=False)
class Removals:
    """Ranges of document numbers, both ends included, ascending and apart."""

    firsts_R: npt.NDArray[np.int64]
    lasts_R: npt.NDArray[np.int64]

    def spare(self, numbers_N: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """[N]: which of these documents are in none of the ranges."""
        places_N = np.searchsorted(self.firsts_R, numbers_N, side="right") - 1
        return (places_N < 0) | (numbers_N > self.lasts_R[places_N])


def removals(ref: pb.MemoryRef) -> Removals | None:
    """What a request says is deleted; None for nothing. Raises FieldError."""
    if not ref.removed:
        return None
    firsts_R = np.array([one.first for one in ref.removed], np.int64)
    lasts_R = np.array([one.last for one in ref.removed], np.int64)
    if firsts_R[0] < 1 or (lasts_R < firsts_R).any() or (firsts_R[1:] <= lasts_R[:-1]).any():
        raise FieldError("ranges of numbers ascend and do not meet", field=_FIELD)
    return Removals(firsts_R, lasts_R)
