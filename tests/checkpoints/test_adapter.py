"""Adapter files: what is loaded from them, and everything that is refused."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from model_adapter.checkpoints import (
    CheckpointError,
    load_directory,
    load_engine_source,
    load_gguf,
    read_adapter,
    write_adapter,
)
from model_adapter.checkpoints import __main__ as command
from model_adapter.checkpoints.adapter import base_hash
from model_adapter.checkpoints.errors import (
    CheckpointNotFoundError,
    CorruptFileError,
    HashMismatchError,
    InvalidConfigError,
    InvalidWeightsError,
    UnsupportedCheckpointError,
)
from model_adapter.engine import DocumentText, Generate
from model_adapter.msa.config import LayerChoice, QueryReduce
from model_adapter.msa.engine import MsaEngine
from storage.paths import DataFolder
from tests.support.tiny_adapters import header, random_tensors, tiny_adapter
from tests.support.tiny_checkpoints import SMOL, tiny_config, write_directory, write_gguf
from tests.support.tiny_msa import answer, remember

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    write_gguf(tmp_path / "Tiny.gguf")
    return tmp_path / "Tiny.gguf"


def test_one_model_out_of_base_and_adapter(tmp_path: Path, base: Path) -> None:
    made = tiny_adapter(tmp_path / "a.safetensors", base)
    adapter = read_adapter(tmp_path / "a.safetensors")
    assert adapter.header == made
    plain, model = load_gguf(base), load_gguf(base, adapter=adapter)
    assert (model.model_id, model.display_name) == ("tiny-with-memory", "Tiny with memory")
    assert model.identity != plain.identity
    msa = model.config.msa
    assert (msa.routed_layers, msa.pool_tokens, msa.top_k) == ((1, 2), 8, 2)
    assert msa.cosine and msa.decouple_router
    assert (msa.query_reduce, msa.layer_choice) == (QueryReduce.MAX, LayerChoice.COMBINED)
    stored = {name: t.bfloat16().float() for name, t in random_tensors(made.layout).items()}
    for index in range(3):
        name = f"model.layers.{index}.self_attn"
        delta = torch.zeros(64, 32)
        if index in made.layout.delta_layers:
            delta = stored[f"layers.{index}.qkv.b"] @ stored[f"layers.{index}.qkv.a"]
        k = plain.weights[f"{name}.k_proj.weight"] + delta[32:48]
        torch.testing.assert_close(model.weights[f"{name}.k_proj.weight"], k)
        if index in made.layout.delta_layers:
            low = f"layers.{index}.gate_up"
            up = (stored[f"{low}.b"] @ stored[f"{low}.a"])[64:]
            full = f"model.layers.{index}.mlp.up_proj.weight"
            torch.testing.assert_close(model.weights[full], plain.weights[full] + up)
        if index in made.layout.routed_layers:
            router = model.weights[f"{name}.router_k_proj.0.weight"]
            assert torch.equal(router, stored[f"layers.{index}.router_k"])
    assert "model.layers.0.self_attn.router_k_proj.0.weight" not in model.weights


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_directories_take_adapters(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "base"
    write_directory(folder, tiny_config(kind), special=SMOL)
    made = header(folder, kind)
    write_adapter(tmp_path / "a.safetensors", made, random_tensors(made.layout))
    model = load_engine_source(
        str(folder), DataFolder(tmp_path), adapter=str(tmp_path / "a.safetensors")
    )
    assert model.display_name == "Tiny with memory"
    assert model.config.msa.routed_layers == (1, 2)
    named = sorted(["config.json", "tokenizer.json", "model.safetensors"])
    digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in named}
    listing = "".join(f"{digests[name]}  {name}\n" for name in named)
    assert made.base.sha256 == hashlib.sha256(listing.encode()).hexdigest()


def test_an_engine_runs_it(tmp_path: Path, base: Path) -> None:
    tiny_adapter(tmp_path / "a.safetensors", base)
    adapter = read_adapter(tmp_path / "a.safetensors")
    engine = MsaEngine(load_gguf(base, adapter=adapter))
    assert engine.description.layout.routed_layers == (1, 2)
    memory = remember(engine, {1: "the garden", 2: "12 letters in the north", 3: "a dog"})
    ranked = engine.route("what is in the garden?", memory, 3)
    assert [len(document.layers) for document in ranked] == [2, 2, 0]
    for document in ranked[:2]:
        layers = [layer.score for layer in document.layers]
        assert document.score == pytest.approx(sum(layers) / 2, abs=1e-6)
    events = answer(engine, Generate("what is in the garden?", 4), memory)
    assert events
    block = engine.encode([DocumentText(1, "the garden " * 9)]).blocks[0]
    assert block.routing_key_LCE.shape[1] == -(-block.tokens // 8)


def test_identity_is_of_what_computes_not_of_what_is_told(tmp_path: Path, base: Path) -> None:
    made = tiny_adapter(tmp_path / "a.safetensors", base)
    path = tmp_path / "b.safetensors"

    def identity(**changes: Any) -> str:
        tensors = random_tensors(made.layout)
        if "seed" in changes:
            tensors = random_tensors(made.layout, changes["seed"])
        told = header(base, **changes.get("layout", {}))
        write_adapter(path, told, tensors)
        return load_gguf(base, adapter=read_adapter(path)).identity

    first = load_gguf(base, adapter=read_adapter(tmp_path / "a.safetensors")).identity
    assert identity() == first
    assert identity(layout={"top_k": 9, "query_reduce": QueryReduce.MEAN}) == first
    assert identity(seed=2) != first
    assert identity(layout={"pool_tokens": 16}) != first


def test_int8_is_close_and_half_as_large(tmp_path: Path, base: Path) -> None:
    made = tiny_adapter(tmp_path / "a.safetensors", base, int8=True)
    adapter = read_adapter(tmp_path / "a.safetensors")
    for name, tensor in random_tensors(made.layout).items():
        step = tensor.abs().amax(dim=1, keepdim=True) / 127
        assert ((adapter.tensors[name] - tensor).abs() <= step * 0.5001).all(), name
    load_gguf(base, adapter=adapter)


def test_the_default_model_takes_the_shipped_adapter_unless_told_otherwise(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from model_adapter import checkpoints
    from model_adapter.checkpoints import default_model

    data = DataFolder(tmp_path)
    monkeypatch.setattr(default_model, "pull", lambda _data: base)
    monkeypatch.setattr(checkpoints, "SHIPPED_ADAPTER", tmp_path / "a.safetensors")
    plain = load_engine_source("default", data)
    tiny_adapter(tmp_path / "a.safetensors", base)
    assert load_engine_source("default", data, adapter="none").identity == plain.identity
    shipped = load_engine_source("default", data)
    assert shipped.identity != plain.identity
    assert load_engine_source(str(base), data).identity == plain.identity


def _rewrite(
    path: Path,
    change: Callable[[Tensors, dict[str, str]], None],
) -> None:
    with safe_open(path, framework="pt") as handle:
        metadata = dict(handle.metadata())
        tensors = {name: handle.get_tensor(name).clone() for name in list(handle.keys())}
    change(tensors, metadata)
    save_file(tensors, path, metadata=metadata)


def _json(key: str, **changes: Any) -> Callable[[Tensors, dict[str, str]], None]:
    def change(_: Tensors, metadata: dict[str, str]) -> None:
        held = json.loads(metadata[key])
        for name, value in changes.items():
            held[name] = value
        metadata[key] = json.dumps(held)

    return change


def _put(**entries: str) -> Callable[[Tensors, dict[str, str]], None]:
    return lambda _, metadata: metadata.update(entries)


def _drop(name: str) -> Callable[[Tensors, dict[str, str]], None]:
    def change(tensors: Tensors, _: dict[str, str]) -> None:
        del tensors[name]

    return change


def _set(name: str, value: torch.Tensor) -> Callable[[Tensors, dict[str, str]], None]:
    return lambda tensors, _: tensors.update({name: value})


NAN = torch.full((32, 32), float("nan"))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (_put(format="pt"), UnsupportedCheckpointError, "not a memsvc-adapter"),
        (_put(format_version="2"), UnsupportedCheckpointError, "version 2.*reads 1"),
        (_put(format_version="one"), CorruptFileError, "format_version"),
        (_put(base="{"), CorruptFileError, "base"),
        (_put(layout="[]"), CorruptFileError, "layout"),
        (_put(name=""), InvalidConfigError, "name"),
        (_json("base", architecture="mamba"), UnsupportedCheckpointError, "mamba"),
        (_json("base", sha256="0" * 63), InvalidConfigError, "sha256"),
        (_json("base", sha256="0" * 64), HashMismatchError, "trained on Tiny"),
        (_json("layout", num_layers=4), InvalidConfigError, "num_layers is 4, the base's is 3"),
        (_json("layout", pool_tokens=0), InvalidConfigError, "pool_tokens"),
        (_json("layout", routed_layers=[]), InvalidConfigError, "routed_layers"),
        (_json("layout", routed_layers=[2, 1]), InvalidConfigError, "routed_layers"),
        (_json("layout", routed_layers=[1, 3]), InvalidConfigError, "routed_layers"),
        (_json("layout", routed_layers=["1"]), InvalidConfigError, "routed_layers"),
        (_json("layout", delta_parts=["mlp"]), InvalidConfigError, "delta_parts"),
        (_json("layout", rank=0), InvalidConfigError, "deltas"),
        (_json("layout", rank=True), InvalidConfigError, "rank"),
        (_json("layout", query_reduce="sum"), InvalidConfigError, "sum"),
        (_json("layout", routed_layers=[0, 1, 2]), InvalidWeightsError, "layers.0.router_k"),
        (_json("training", sources=[1]), InvalidConfigError, "sources"),
        (_json("training", seed=-1), InvalidConfigError, "seed"),
        (_drop("layers.1.router_q"), InvalidWeightsError, "missing tensors: layers.1.router_q"),
        (_drop("layers.0.down.b"), InvalidWeightsError, "missing tensors: layers.0.down.b"),
        (_set("layers.1.extra", NAN), InvalidWeightsError, "unexpected tensors"),
        (_set("layers.1.router_q", NAN), InvalidWeightsError, "router_q holds NaN"),
        (_set("layers.1.router_q", NAN[:31]), InvalidWeightsError, r"\[31, 32\]"),
        (_set("layers.0.down.a", torch.ones(3, 65)), InvalidWeightsError, r"gate_up|down"),
        (
            _set("layers.1.router_q", torch.ones(32, 32).to(torch.int32)),
            InvalidWeightsError,
            "is I32",
        ),
        (
            _set("layers.1.router_q", torch.ones(32, 32).to(torch.int8)),
            InvalidWeightsError,
            "missing tensors: layers.1.router_q.scale",
        ),
    ],
)
def test_files_that_are_refused(
    tmp_path: Path,
    base: Path,
    change: Callable[[Tensors, dict[str, str]], None],
    error: type[CheckpointError],
    match: str,
) -> None:
    path = tmp_path / "a.safetensors"
    tiny_adapter(path, base)
    _rewrite(path, change)
    with pytest.raises(error, match=match):
        load_gguf(base, adapter=read_adapter(path))


def test_nan_in_a_scale(tmp_path: Path, base: Path) -> None:
    path = tmp_path / "a.safetensors"
    tiny_adapter(path, base, int8=True)
    _rewrite(path, _set("layers.1.router_q.scale", NAN[0].clone()))
    with pytest.raises(InvalidWeightsError, match="NaN"):
        read_adapter(path)


def test_cut_files(tmp_path: Path, base: Path) -> None:
    path = tmp_path / "a.safetensors"
    tiny_adapter(path, base)
    whole = path.read_bytes()
    for size in (0, 7, 200, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CorruptFileError):
            read_adapter(path)
    with pytest.raises(CheckpointNotFoundError):
        read_adapter(tmp_path / "none.safetensors")


def test_a_base_of_another_kind(tmp_path: Path, base: Path) -> None:
    write_directory(tmp_path / "published", tiny_config())
    tiny_adapter(tmp_path / "a.safetensors", base)
    adapter = read_adapter(tmp_path / "a.safetensors")
    with pytest.raises(UnsupportedCheckpointError, match="routers of its own"):
        load_directory(tmp_path / "published", adapter=adapter)
    write_directory(tmp_path / "other", tiny_config("llama"), special=SMOL)
    with pytest.raises(HashMismatchError):
        load_directory(tmp_path / "other", adapter=adapter)
    qwen = tmp_path / "qwen"
    write_directory(qwen, tiny_config("qwen3"), special=SMOL)
    tiny_adapter(tmp_path / "q.safetensors", qwen)
    with pytest.raises(InvalidConfigError, match="architecture is llama, the base's is qwen3"):
        load_directory(qwen, adapter=read_adapter(tmp_path / "q.safetensors"))
    with pytest.raises(CheckpointNotFoundError):
        base_hash(tmp_path / "nothing")


def test_nothing_is_written_of_bad_tensors(tmp_path: Path, base: Path) -> None:
    made = header(base)
    good = random_tensors(made.layout)
    for name, value in (("layers.1.router_q", NAN), ("layers.1.router_k", NAN[:3])):
        with pytest.raises(InvalidWeightsError):
            write_adapter(tmp_path / "a.safetensors", made, {**good, name: value})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Tiny.gguf"]


def test_the_command_line_shows_and_a_worker_refuses(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.safetensors"
    tiny_adapter(path, base)
    arguments = ["show", str(base), "--adapter", str(path), "--data-dir", str(tmp_path), "--json"]
    assert command.main(arguments) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["model_id"], shown["routed_layers"]) == ("tiny-with-memory", [1, 2])
    _rewrite(path, _json("base", sha256="0" * 64))
    assert command.main(arguments) == 1
    assert "HashMismatchError" in capsys.readouterr().err
    worker = [sys.executable, "-m", "model_adapter", "--listen", f"unix:{tmp_path}/s"]
    worker += ["--data-dir", str(tmp_path), "--model", str(base), "--adapter", str(path)]
    done = subprocess.run(worker, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and "was trained on Tiny" in done.stderr
