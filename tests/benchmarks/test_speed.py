"""The speed benchmarks run through on a tiny random model and report what they say they do."""

from __future__ import annotations

import json
import sys
from itertools import count
from pathlib import Path

import pytest
import torch

from benchmarks import encode, endtoend, generate, paging, precision, routing, routing_cuda
from benchmarks.models import SHAPES, byte_tokenizer, parameters
from benchmarks.rates import Rates, Timing
from model_adapter.msa.kernels import KeyFormat


def report(
    main: object,
    arguments: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> dict[str, object]:
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments.split()])
    assert callable(main)
    main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("way", ["auto --routing-keys auto", "padded --routing-keys two-stage"])
def test_generate(
    way: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = f"--model random:tiny --device cpu --concurrent 1 2 --tokens 3 --way {way}"
    found = report(
        generate.main, f"{arguments} --documents 5 --no-plain --json", monkeypatch, capsys
    )
    rows = found["results"]
    assert isinstance(rows, list) and [row["at_once"] for row in rows] == [1, 2]
    assert all(row["tokens_per_s"] > 0 and row["ttft_p99_ms"] >= row["ttft_p50_ms"] for row in rows)


def test_generate_says_where_the_time_goes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = "--model random:tiny --device cpu --concurrent 2 --tokens 2 --way padded --profile"
    found = report(
        generate.main, f"{arguments} --documents 5 --no-plain --json", monkeypatch, capsys
    )
    rows = found["results"]
    assert isinstance(rows, list)
    assert set(rows[0]["profile_ms"]) >= {"routing", "prefill", "rows", "decode", "host"}
    assert rows[0]["turns"]["host"] == 1


def test_generate_ends_in_time_and_says_what_it_has(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever is not done by then is cut or left out."""
    arguments = "--model random:tiny --device cpu --concurrent 1 2 --tokens 9 --documents 5"
    ends = f"{arguments} --no-plain --json --seconds 1e-9"
    assert report(generate.main, ends, monkeypatch, capsys)["results"] == []
    clock = count(0, 0.001)
    monkeypatch.setattr("benchmarks.generate.time.perf_counter", lambda: next(clock))
    rows = report(
        generate.main, f"{arguments} --no-plain --json --seconds 0.1", monkeypatch, capsys
    )
    found = rows["results"]
    assert isinstance(found, list) and [row["at_once"] for row in found] == [1]
    assert found[0]["cut"] and found[0]["tokens_per_s"] > 0


def test_encode(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--model random:tiny --device cpu --documents 3 --letters 90 --repeats 1"
    found = report(encode.main, f"{arguments} --matmul 64 --json", monkeypatch, capsys)
    assert found["tokens"] and found["tflops"] is not None and found["share_of_bare"]


def test_paging(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--device cpu --documents 20 --layers 2 --repeats 1 --json"
    found = report(paging.main, arguments, monkeypatch, capsys)
    assert isinstance(found["cold_s"], float) and found["over_floor"]
    fetched = found["fetch"]
    assert isinstance(fetched, dict) and list(fetched) == ["1", "16", "64"]
    leased = found["lease"]
    names = [f"{count}_{way}_ms" for count in (1, 16) for way in ("together", "each")]
    assert isinstance(leased, dict) and list(leased) == names


def test_a_worker_over_a_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = f"--model random:tiny --device cpu --tokens 2000 --repeats 1 --folder {tmp_path}"
    keys = "--routing-keys int8"
    found = report(endtoend.main, f"{arguments} {keys} --json", monkeypatch, capsys)
    assert found["routed_chunks"] and "int8" in str(found["placement"])


def test_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On random keys too the exact choice is what two stages find, where all survive."""
    corpus = [{"doc_id": str(n), "text": f"text {n} of the harbour"} for n in range(40)]
    question = {"id": "q", "question": "which harbour?", "gold_doc_ids": ["3"]}
    for name, rows in (("corpus", corpus), ("questions", [question])):
        lines = "\n".join(json.dumps(row) for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    arguments = f"--bank {tmp_path} --model random:tiny --device cpu --json"
    found = report(precision.main, arguments, monkeypatch, capsys)
    recall = found["recall_at_16"]
    assert isinstance(recall, dict) and list(recall) == ["int8", "int4", "two-stage"]
    assert recall["two-stage"] == {"each": 1.0, "together": 1.0}
    assert recall["int8"]["each"] > 0.8


def test_both_formulas_choose_alike() -> None:
    """In slices or at once; a token that does not vote is as one that is not there."""
    device = torch.device("cpu")
    memory = routing.make_memory(routing.REFERENCE_SLICE + 300, torch.float32, device, seed=0)
    q_THD = torch.randn(3, routing.HEADS, routing.HEAD_DIM)
    votes_T = torch.tensor([True, False, True])
    scores_N = routing.straightforward(q_THD[votes_T], memory.keys_CE, memory)
    chosen = routing.reference(q_THD, memory.keys_CE, votes_T, memory)
    assert chosen.tolist() == scores_N.topk(routing.TOP_K).indices.tolist()


def test_routing_on_a_device() -> None:
    timing = Timing(torch.device("cpu"), 1)
    few = routing_cuda.Shape(layers=2, tokens=3)
    found = routing_cuda.against_formula(300, few, timing)
    assert isinstance(found["float"], dict) and found["float"]["agreement"] == 1.0
    rates = Rates(copied=1e9, floats=1e6, integers=1e12)
    for to, floor in ((KeyFormat.FLOAT, "products"), (KeyFormat.INT8, "bytes")):
        (row,) = routing_cuda.one_memory(200, (2,), few, to, timing, rates)
        assert row["floor"] == floor
    many = routing_cuda.many_memories(3, 9, 2, few, timing, rates)
    assert many["questions"] == 2 and many["ms_per_layer"]


def test_a_random_model_has_what_its_shape_says() -> None:
    sizes = {name: torch.Size(size).numel() for name, size in parameters(SHAPES["4b"])}
    assert 4.0e9 < sum(sizes.values()) < 4.6e9  # routers included
    assert "model.layers.17.self_attn.router_q_proj.0.weight" not in sizes
    assert "model.layers.18.self_attn.router_q_proj.0.weight" in sizes
    tokenizer = byte_tokenizer(512)
    ids = tokenizer.encode("Größe <|im_end|>\n").ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == "Größe <|im_end|>\n"
    assert tokenizer.get_vocab_size() == SHAPES["tiny"].vocab_size == 512
    assert tokenizer.decode([400]) == "token400"
