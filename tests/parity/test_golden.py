"""The golden vectors of the published implementation, and the command that compares them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model_adapter.parity.__main__ import compare_directory, main
from model_adapter.parity.source import Source
from tests.support.golden_checkpoint import (
    GOLDEN,
    WEIGHTS_SHA256,
    digest,
    golden_weights,
    write_golden,
)

Results = dict[str, dict[str, Any]]
FILES = sorted(
    path.name
    for path in (GOLDEN / "vectors").iterdir()
    if path.suffix == ".safetensors" or path.stem.startswith(("oneshot", "interleave"))
    if not (path.suffix == ".safetensors" and path.with_suffix(".json").exists())
)


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("golden")
    write_golden(folder)
    return folder


@pytest.fixture(scope="module")
def results(golden: Path) -> Iterator[Results]:
    yield compare_directory(golden)


def test_the_checkpoint_is_that_of_the_vectors() -> None:
    assert digest(golden_weights()) == WEIGHTS_SHA256


def test_the_vectors_stay_small() -> None:
    folders = (GOLDEN / "vectors", GOLDEN / "checkpoint")
    size = sum(path.stat().st_size for folder in folders for path in folder.iterdir())
    assert size <= 2_000_000


def test_every_file_is_compared(results: Results) -> None:
    assert sorted(results) == FILES


@pytest.mark.parametrize("name", FILES)
def test_file(results: Results, name: str) -> None:
    result = results[name]
    assert result["pass"], json.dumps(result, indent=1)
    assert result["compared"] > 0


def test_exact_pool_is_tight(results: Results) -> None:
    exact = results["oneshot_fp32_k4_exactpool.json"]
    assert exact["by_kind"]["logits"] <= 2e-5
    assert exact["by_kind"]["scores"] <= 2e-5
    assert "near_ties" not in exact
    assert results["memory_fp32_exactpool.safetensors"]["max_difference"] <= 2e-5


def test_all_variants_choose_the_same_documents(results: Results) -> None:
    variants = [name for name in results if name.startswith("oneshot_var_")]
    assert len(variants) == 6
    assert not any("near_ties" in results[name] for name in variants)


def _copy(golden: Path, folder: Path, *names: str) -> None:
    for name in ("docs.json", "queries.json", "variants.json", "ckpt_fp32", *names):
        (folder / name).symlink_to(golden / name)


def test_a_difference_fails_its_file(golden: Path, tmp_path: Path) -> None:
    _copy(golden, tmp_path)
    tensors = load_file(golden / "memory_fp32_exactpool.safetensors")
    tensors["layer2.k"][0, 5, 3] += 1e-3
    save_file(tensors, tmp_path / "memory_fp32_exactpool.safetensors")
    result: dict[str, Any] = next(iter(compare_directory(tmp_path).values()))
    assert not result["pass"]
    assert result["max_difference"] == pytest.approx(1e-3, rel=0.05)


def test_another_document_fails(golden: Path, tmp_path: Path) -> None:
    name = "oneshot_fp32_k4_exactpool"
    _copy(golden, tmp_path, f"{name}.safetensors")
    entries = json.loads((golden / f"{name}.json").read_text())[:1]
    documents = entries[0]["layers"]["2"]["topk_doc_ids"]
    documents[0], documents[1] = documents[1], documents[0]
    (tmp_path / f"{name}.json").write_text(json.dumps(entries))
    result: dict[str, Any] = next(iter(compare_directory(tmp_path).values()))
    assert not result["pass"]
    assert "layer2.topk" in result["mismatches"][0]


def test_another_token_fails(golden: Path, tmp_path: Path) -> None:
    _copy(golden, tmp_path, "interleave.safetensors")
    scenarios = json.loads((golden / "interleave.json").read_text())
    scenarios = {"eor_first": scenarios["eor_first"]}
    scenarios["eor_first"]["rounds"][0]["post"][0] += "!"
    (tmp_path / "interleave.json").write_text(json.dumps(scenarios))
    result: dict[str, Any] = compare_directory(tmp_path)["interleave.json"]
    assert not result["pass"]
    assert "post" in result["mismatches"][0]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("oneshot_broken.json", "{"),
        ("oneshot_empty.json", "[]"),
        ("oneshot_wrong.json", '[{"layers": 3}]'),
        ("interleave_bad.json", '{"a": {"rounds": [1], "questions": ["q"]}}'),
        ("memory_broken.safetensors", "no tensors here"),
        ("oneshot_alone.safetensors", "x"),
    ],
)
def test_a_malformed_file_is_an_error_entry(
    golden: Path, tmp_path: Path, name: str, content: str
) -> None:
    _copy(golden, tmp_path, "memory_fp32_exactpool.safetensors")
    (tmp_path / name).write_text(content)
    results = compare_directory(tmp_path)
    assert results["memory_fp32_exactpool.safetensors"]["pass"]
    assert not results[name]["pass"]
    assert results[name]["error"]


def test_a_variant_that_only_the_file_knows(golden: Path, tmp_path: Path) -> None:
    _copy(golden, tmp_path)
    entries = json.loads((golden / "oneshot_var_headmax.json").read_text())
    own = {"msa_config": {"head_reduce_method": "max"}, "queries": entries}
    (tmp_path / "oneshot_var_own.json").write_text(json.dumps(own))
    tensors = load_file(golden / "oneshot_var_headmax.safetensors")
    save_file(tensors, tmp_path / "oneshot_var_own.safetensors")
    assert compare_directory(tmp_path)["oneshot_var_own.json"]["pass"]
    own["msa_config"] = {"head_reduce_method": "mean"}
    (tmp_path / "oneshot_var_own.json").write_text(json.dumps(own))
    assert not compare_directory(tmp_path)["oneshot_var_own.json"]["pass"]


def test_command_line(golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _copy(golden, tmp_path, "memory_fp32_exactpool.safetensors")
    assert main([str(tmp_path)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["pass"] and printed["passed"] == printed["files"] == 1
    assert printed["results"]["memory_fp32_exactpool.safetensors"]["max_difference"] < 2e-5
    (tmp_path / "memory_junk.safetensors").write_bytes(b"junk")
    assert main([str(tmp_path)]) == 1
    empty = tmp_path / "empty"
    empty.mkdir()
    assert main([str(empty)]) == 1
    assert torch.is_inference_mode_enabled() is False


@pytest.mark.parametrize(
    ("stem", "decoupled", "cosine", "pool"),
    [
        ("memory_fp32_exactpool", True, False, 64),
        ("oneshot_var_coupled", False, False, 64),
        ("oneshot_var_coupled_infonce", False, True, 64),
        ("oneshot_var_coupled_infonce_exactpool", False, True, 64),
        ("oneshot_var_infonce_k8", True, True, 64),
        ("memory_var_pool16", True, False, 16),
    ],
)
def test_a_file_name_says_its_variant(
    golden: Path, stem: str, decoupled: bool, cosine: bool, pool: int
) -> None:
    with torch.inference_mode():
        msa = Source(golden).setup(stem).config.msa
    assert (msa.decouple_router, msa.cosine, msa.pool_tokens) == (decoupled, cosine, pool)
