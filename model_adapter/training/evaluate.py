"""Recall on questions that training held out, through encoding and routing as they serve."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from model_adapter.msa import ranking
from model_adapter.msa.config import ComputeDtype
from model_adapter.msa.encode import TokenisedDocument, batches, encode_batch
from model_adapter.msa.forward import RoutingRequest, Segment, encode_prefix, new_row, run
from model_adapter.msa.memory import InMemoryView
from model_adapter.msa.model import Decoder
from model_adapter.training.corpus import Corpus
from model_adapter.training.data import Query
from model_adapter.training.settings import Settings

CUTOFFS = (1, 5, 10)
_TOGETHER = 16


def held_out_recall(
    decoder: Decoder, corpus: Corpus, settings: Settings, head: Sequence[int], limit: int = 0
) -> dict[str, float]:
    """recall@5 by set, and the means at 1, 5 and 10 over sets.

    limit: questions per set, the first ones, over the same documents; 0 for all.
    """
    found: dict[str, float] = {}
    by_set: dict[int, list[float]] = {cut: [] for cut in CUTOFFS}
    with torch.no_grad():
        prefix = encode_prefix(decoder, head)
        for place, source in enumerate(corpus.sources):
            queries = [query for query in corpus.held_out if query.source == place]
            if not queries:
                continue
            documents = _bank(corpus, place, queries, settings)
            view = _remember(decoder, corpus, documents)
            queries = queries[: limit or None]
            at = {n: number for number, n in enumerate(documents, start=1)}
            hits: dict[int, list[float]] = {cut: [] for cut in CUTOFFS}
            for first in range(0, len(queries), _TOGETHER):
                group = queries[first : first + _TOGETHER]
                segments = [
                    Segment(
                        new_row(decoder, prefix, len(head) + settings.top_k),
                        query.ids,
                        RoutingRequest(view, [True] * len(query.ids), max(CUTOFFS)),
                    )
                    for query in group
                ]
                routings = run(decoder, segments, only_routing=True).routings
                for query, routing in zip(group, routings, strict=True):
                    assert routing is not None
                    best = [d.number for d in ranking.rank(routing, view.numbers_N, max(CUTOFFS))]
                    gold = {at[n] for n in query.gold}
                    for cut in CUTOFFS:
                        hits[cut].append(len(gold & set(best[:cut])) / len(gold))
            found[source.name] = round(float(np.mean(hits[5])), 4)
            for cut in CUTOFFS:
                by_set[cut].append(float(np.mean(hits[cut])))
    for cut in CUTOFFS:
        found[f"mean@{cut}"] = round(float(np.mean(by_set[cut])), 4) if by_set[cut] else 0.0
    return found


def _bank(corpus: Corpus, place: int, queries: Sequence[Query], settings: Settings) -> list[int]:
    """Gold documents, and others of the set up to held_out_bank."""
    gold = dict.fromkeys(n for query in queries for n in query.gold)
    others = np.flatnonzero(corpus.source_N == place)
    others = np.random.default_rng([settings.sets_seed, place, 0xBA4C]).permutation(others)
    more = [int(n) for n in others if int(n) not in gold]
    return sorted([*gold, *more[: max(settings.held_out_bank - len(gold), 0)]])


def _remember(decoder: Decoder, corpus: Corpus, documents: Sequence[int]) -> InMemoryView:
    tokenised = [
        TokenisedDocument(number, corpus.tokens[n]) for number, n in enumerate(documents, start=1)
    ]
    blocks = [block for batch in batches(tokenised) for block in encode_batch(decoder, batch)]
    dtype: ComputeDtype = "fp32" if decoder.dtype is torch.float32 else "bf16"
    texts = {number: corpus.documents[n].text for number, n in enumerate(documents, start=1)}
    return InMemoryView(decoder.config.layout(dtype), blocks, texts)
