"""injection_*: the segment that stage 3 puts in, as published and causal."""

from __future__ import annotations

import re

import torch

from model_adapter.msa.forward import Attend, RoutingRequest, Row, Segment, run
from model_adapter.parity.comparison import Comparison, Kind
from model_adapter.parity.reference_text import prompt_row
from model_adapter.parity.source import GoldenError, Setup, Source


def compare_injection(source: Source, stem: str) -> Comparison:
    """Logits of the segment behind the first question and the retrieval-end tokens."""
    comparison = Comparison(source.tolerance(stem))
    golden = source.tensors(f"{stem}.safetensors")
    found = re.search(r"_k(\d+)", stem)
    questions = source.json("queries.json")
    if not found or not questions:
        raise GoldenError(f"{stem}: neither top_k in its name nor a question")
    setup = source.setup(stem)
    for name, attend in (
        ("logits_reference_bidirectional", Attend.BIDIRECTIONAL),
        ("logits_causal_one_at_a_time", Attend.CAUSAL),
    ):
        if name in golden:
            row = _row_after(setup, questions[0], int(found[1]), golden["eor_input_ids"].tolist())
            segment = Segment(row, golden["segment_input_ids"].tolist(), attend=attend)
            logits = run(setup.decoder, [segment], every_token=True).logits
            assert logits is not None
            comparison.tensor(Kind.LOGITS, name, logits, golden[name])
    return comparison


def _row_after(setup: Setup, question: str, k: int, ids: list[int]) -> Row:
    prompt = prompt_row(setup.tokenizer, question)
    row = setup.row(k)
    votes = [marker == 0 for marker in prompt.markers]
    run(setup.decoder, [Segment(row, prompt.ids, RoutingRequest(setup.memory, votes, k))])
    for token in torch.tensor(ids).flatten().tolist():
        run(setup.decoder, [Segment(row, [token])])
    return row
