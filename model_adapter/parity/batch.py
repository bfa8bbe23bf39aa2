"""batch_* files: the questions as one left-padded batch."""

from __future__ import annotations

import re

from model_adapter.parity.comparison import NO_SCORE, Comparison
from model_adapter.parity.oneshot import Case, check_routing, decode_along, prefill
from model_adapter.parity.reference_text import ReferenceRow
from model_adapter.parity.source import Source

_CHOSEN = re.compile(r"layer(\d+)\.topk_doc_ids")


def compare_batch(source: Source, stem: str) -> Comparison:
    """A left-padded batch: every row must be what it is alone."""
    comparison = Comparison(source.tolerance(stem))
    golden = source.tensors(f"{stem}.safetensors")
    layers = {
        int(m[1]) for name in golden if (m := re.fullmatch(r"layer(\d+)\.topk_doc_ids", name))
    }
    setup = source.setup(stem, layers=layers)
    for place in range(golden["input_ids"].shape[0]):
        mask = golden["attention_mask"][place].bool()
        ids = golden["input_ids"][place][mask].tolist()
        markers = golden["doc_ids"][place][mask].tolist()
        positions = golden["position_ids"][place][mask].tolist()
        k = positions[0] - len(setup.head)
        name = f"row{place}."
        comparison.equal(
            f"{name}positions", positions, list(range(positions[0], positions[0] + len(ids)))
        )
        chosen = {}
        own = {}
        for layer in layers:
            scores = golden.get(f"layer{layer}.doc_scores")
            documents = golden[f"layer{layer}.topk_doc_ids"][place].tolist()
            if scores is not None:
                own[f"layer{layer}.doc_scores"] = scores[place]
                documents = [n for n in documents if float(scores[place][n + 1]) > NO_SCORE]
            chosen[layer] = documents
        row = setup.row(k)
        prompt = ReferenceRow(ids, markers)
        outcome = prefill(setup, row, prompt, k, chosen, pads=int((~mask).sum()))
        case = Case(comparison, setup, name, own)
        check_routing(case, outcome, chosen)
        tokens = golden["tokens"][place].tolist()
        decode_along(case, row, outcome, tokens, golden["step_logits"][place])
    return comparison
