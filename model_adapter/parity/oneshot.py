"""oneshot_* files: routing, prefill and greedy decoding of single questions."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from model_adapter.msa.config import QueryReduce
from model_adapter.msa.forward import Outcome, RoutingRequest, Row, Segment, run
from model_adapter.msa.routing import prepare, score_chunks, select
from model_adapter.parity.comparison import NO_SCORE, Comparison, Kind, decided
from model_adapter.parity.reference_text import ReferenceRow, decode, prompt_row
from model_adapter.parity.source import GoldenError, Setup, Source

_HIDDEN = re.compile(r"(embed|attn\d+|layer\d+|final_norm)")


@dataclass(frozen=True)
class Case:
    """One row: where its differences go, its model, its name and its golden tensors."""

    comparison: Comparison
    setup: Setup
    name: str
    tensors: Mapping[str, torch.Tensor]


def compare_oneshot(source: Source, stem: str) -> Comparison:
    """A json with one entry per question, and its tensors."""
    comparison = Comparison(source.tolerance(stem))
    raw = source.json(f"{stem}.json")
    queries = (
        raw
        if isinstance(raw, list)
        else next(
            (raw[key] for key in ("queries", "results", "items") if isinstance(raw.get(key), list)),
            [],
        )
    )
    if not queries:
        raise GoldenError(f"{stem}.json: no questions")
    tensors = source.tensors(f"{stem}.safetensors")
    layers = {int(layer) for layer in queries[0]["layers"]}
    setup = source.setup(stem, raw, layers)
    for place, query in enumerate(queries):
        prefix = f"q{place}."
        own = {
            name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)
        }
        _compare_query(Case(comparison, setup, prefix, own), query)
    return comparison


def _compare_query(case: Case, query: Mapping[str, Any]) -> None:
    comparison, setup, name = case.comparison, case.setup, case.name
    if "query" in query:
        row = prompt_row(setup.tokenizer, query["query"])
        comparison.equal(f"{name}input_ids", row.ids, query["input_ids"])
        comparison.equal(f"{name}doc_ids", row.markers, query["doc_ids"])
    ids, markers = query["input_ids"], query["doc_ids"]
    k = query["position_ids"][0] - len(setup.head)
    comparison.equal(
        f"{name}position_ids",
        list(range(len(setup.head) + k, len(setup.head) + k + len(ids))),
        query["position_ids"],
    )
    golden = {
        int(layer): _valid(entry["topk_doc_ids"], entry.get("topk_scores"))
        for layer, entry in query["layers"].items()
    }
    probe: dict[str, torch.Tensor] = {}
    prompt = ReferenceRow(ids, markers)
    run_row = setup.row(k)
    outcome = prefill(setup, run_row, prompt, k, golden, probe=probe)
    check_routing(case, outcome, golden)
    _check_chunks(case, query, outcome, probe)
    _check_states(case, probe, run_row, outcome)
    decode_along(case, run_row, outcome, query["tokens"], case.tensors.get("step_logits"))
    if "text" in query and comparison.tolerance.near_tie < 0.01:
        comparison.equal(f"{name}text", decode(setup.tokenizer, query["tokens"]), query["text"])


def _valid(ids: Sequence[int], scores: Sequence[float] | None) -> list[int]:
    """The recall list without the reference's dummy entries."""
    if scores is None:
        return list(ids)
    return [n for n, score in zip(ids, scores, strict=True) if score > NO_SCORE]


def prefill(
    setup: Setup,
    row: Row,
    prompt: ReferenceRow,
    k: int,
    golden: Mapping[int, Sequence[int]],
    *,
    probe: dict[str, torch.Tensor] | None = None,
    pads: int = 0,
) -> Outcome:
    """Prefills with the golden selection, so that one near tie does not hide the rest;
    our own choice is in the scores."""
    votes = [marker == 0 for marker in prompt.markers]
    last = None
    if setup.config.msa.query_reduce is QueryReduce.LAST:
        last = sum(votes) - 1 - pads  # counted from the start of the padded row
    forced = {layer: np.array(chosen, dtype=np.int64) for layer, chosen in golden.items()}
    request = RoutingRequest(setup.memory, votes, k, last=last, forced=forced)
    segment = Segment(row, prompt.ids, request)
    keep = None if probe is None else probe.__setitem__
    return run(setup.decoder, [segment], every_token=True, probe=keep)


def check_routing(case: Case, outcome: Outcome, golden: Mapping[int, Sequence[int]]) -> None:
    """Document scores and the documents of every routed layer, best first."""
    comparison, setup, name = case.comparison, case.setup, case.name
    routing = outcome.routings[0]
    assert routing is not None
    for layer, documents in golden.items():
        ours = routing.scores_N.get(layer)
        if ours is None:
            ours = np.full(len(setup.texts), -np.inf, dtype=np.float32)
        theirs = case.tensors.get(f"layer{layer}.doc_scores")
        if theirs is not None:
            comparison.tensor(
                Kind.SCORES, f"{name}layer{layer}.doc_scores", torch.from_numpy(ours), theirs[1:]
            )
        scores_N = ours if theirs is None else theirs[1:].float().numpy()
        chosen = [int(n) for n in select(ours, len(documents))] if documents else []
        comparison.ranking(f"{name}layer{layer}.topk", chosen, documents, scores_N)


def _check_chunks(
    case: Case,
    query: Mapping[str, Any],
    outcome: Outcome,
    probe: Mapping[str, torch.Tensor],
) -> None:
    """Routing queries, votes, chunk scores and what was taken in, per routed layer."""
    comparison, setup, name, tensors = case.comparison, case.setup, case.name, case.tensors
    votes_T = torch.tensor([marker == 0 for marker in query["doc_ids"]])
    last = int(votes_T.sum()) - 1 if setup.config.msa.query_reduce is QueryReduce.LAST else None
    routing = outcome.routings[0]
    assert routing is not None
    for place, layer in enumerate(setup.config.msa.routed_layers):
        base = f"layer{layer}."
        q_THD = probe[f"routing_query{layer}"]
        if (golden := tensors.get(f"{base}router_q")) is not None:
            comparison.tensor(Kind.HIDDEN, f"{name}{base}router_q", q_THD.transpose(0, 1), golden)
        if (golden := tensors.get(f"{base}query_mask")) is not None:
            comparison.equal(f"{name}{base}query_mask", votes_T.tolist(), golden.bool().tolist())
        if (golden := tensors.get(f"{base}chunk_scores")) is not None:
            routing_query = prepare(
                q_THD, votes_T, setup.config.num_kv_heads, setup.config.msa, k=1, last=last
            )
            assert routing_query is not None
            _, keys_CE = next(iter(setup.memory.routing_keys(place)))
            ours = score_chunks(routing_query, keys_CE)
            comparison.tensor(Kind.SCORES, f"{name}{base}chunk_scores", ours, golden)
        entry = query["layers"].get(str(layer), {})
        chosen = routing.chosen.get(layer, np.empty(0, dtype=np.int64))
        offsets = setup.memory.chunk_offsets_N1
        if "n_selected_chunks" in entry:
            chunks = int(sum(offsets[n + 1] - offsets[n] for n in chosen))
            comparison.equal(f"{name}{base}chunks", chunks, entry["n_selected_chunks"])
        if "kv_doc_order" in entry:
            comparison.equal(
                f"{name}{base}kv_doc_order", sorted(map(int, chosen)), entry["kv_doc_order"]
            )


def _check_states(
    case: Case, probe: Mapping[str, torch.Tensor], row: Row, outcome: Outcome
) -> None:
    """Hidden states, all prefill logits, and the KV that the row now holds."""
    comparison, name = case.comparison, case.name
    head = len(case.setup.head)
    for key, golden in case.tensors.items():
        if key.startswith("hidden.") and _HIDDEN.fullmatch(key[7:]):
            comparison.tensor(Kind.HIDDEN, name + key, probe[key[7:]], golden)
        elif key == "prefill_logits":
            assert outcome.logits is not None
            comparison.tensor(Kind.LOGITS, name + key, outcome.logits, golden)
        elif found := re.fullmatch(r"layer(\d+)\.(compact_k|compact_v|selected_k)", key):
            keys, values = row.cache.read(int(found[1]))
            ours = values if found[2] == "compact_v" else keys
            if found[2] == "selected_k":
                ours = ours[:, head : head + golden.shape[1]]
            comparison.tensor(Kind.MEMORY, name + key, ours, golden)


def decode_along(
    case: Case, row: Row, outcome: Outcome, tokens: Sequence[int], golden: torch.Tensor | None
) -> None:
    """Greedy steps, fed with the golden tokens; in fp32 our own choice must be the same."""
    comparison, setup, name = case.comparison, case.setup, case.name
    assert outcome.logits is not None
    logits_V = outcome.logits[-1]
    for step, token in enumerate(tokens):
        if golden is not None and step < len(golden):
            comparison.tensor(Kind.LOGITS, f"{name}step{step}", logits_V, golden[step])
            if decided(golden[step], comparison.tolerance.logits):
                comparison.equal(f"{name}token{step}", int(logits_V.argmax()), token)
        if token in setup.eos_ids:
            return
        if step + 1 < len(tokens):
            logits = run(setup.decoder, [Segment(row, [token])]).logits
            assert logits is not None
            logits_V = logits[0]
