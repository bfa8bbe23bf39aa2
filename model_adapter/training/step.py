"""One step's losses, by the functions that encode and route in serving."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from model_adapter.msa.config import QueryReduce
from model_adapter.msa.encode import Pooling, routing_keys
from model_adapter.msa.model import Decoder, Projected, Want
from model_adapter.msa.packed import PackedRows, See, moved, run_layers
from model_adapter.msa.routing import mean_heads, scaled_query
from model_adapter.training import losses
from model_adapter.training.batch import Batch, Stream
from model_adapter.training.settings import Settings, Weights
from model_adapter.training.winners import NEVER, take_slots


@dataclass(frozen=True)
class Outcome:
    """total: what is minimised. parts: each loss as a float tensor; hits: share of queries
    whose best document of the batch is a gold one."""

    total: torch.Tensor
    parts: dict[str, torch.Tensor]


class Step:
    """Runs batches through a decoder."""

    def __init__(self, decoder: Decoder, settings: Settings) -> None:
        self._decoder, self._settings = decoder, settings
        msa = decoder.config.msa
        first = settings.first_delta_layer if settings.rank else decoder.config.num_layers
        #: Layers below this one run without gradients: nothing in them is trained.
        self._frozen = min(first, msa.routed_layers[0])

    def run(self, batch: Batch, weights: Weights, scale: torch.Tensor) -> Outcome:
        """Losses of a batch; scale: the combined score's inverse temperature."""
        keys = self._document_keys(batch.documents)
        queries = self._query_vectors(batch)
        chunks_DX = self._chunk_places(batch.documents)
        mean_tokens = self._decoder.config.msa.query_reduce is QueryReduce.MEAN
        scores = [
            losses.document_scores(query, batch.votes_QS, key, chunks_DX, mean_tokens=mean_tokens)
            for query, key in zip(queries, keys, strict=True)
        ]
        relevance = losses.without_false_negatives(
            batch.positive_QD, batch.ignored_QD, batch.teacher_QD
        )
        combined_QD = torch.stack(scores).mean(0)
        temperature = self._settings.losses.temperature
        parts: dict[str, torch.Tensor] = {}
        if weights.layers:
            each = [losses.contrastive(score / temperature, relevance) for score in scores]
            parts["layers"] = torch.stack(each).mean()
        if weights.combined:
            parts["combined"] = losses.contrastive(combined_QD * scale, relevance)
        if weights.teacher and relevance.teacher_QD is not None:
            parts["teacher"] = losses.distillation(combined_QD * scale, relevance)
        if weights.answer and batch.answers is not None:
            logits_AV = self._answer_logits(batch.answers, batch.at_A)
            parts["answer"] = losses.answers(logits_AV, batch.targets_A)
        total = torch.stack([getattr(weights, name) * part for name, part in parts.items()]).sum()
        best_Q = combined_QD.masked_fill(relevance.ignored_QD, NEVER).argmax(dim=1)
        hits_Q = batch.positive_QD.gather(1, best_Q[:, None])
        parts["hits"] = hits_Q.float().mean()
        return Outcome(total, {name: part.detach() for name, part in parts.items()})

    def _enter(self, stream: Stream) -> tuple[PackedRows, torch.Tensor]:
        """Hidden states that leave the layers in which nothing is trained."""
        decoder = self._decoder
        positions = (stream.positions_T, stream.end)
        rows = PackedRows(stream.lengths, decoder.device, positions, training=True)
        with torch.no_grad():
            hidden_TM = decoder.embed(stream.ids_T)
            hidden_TM = run_layers(decoder, rows, hidden_TM, range(self._frozen))
        return rows, hidden_TM

    def _routed(self, stream: Stream, want: Want, see: See) -> None:
        rows, hidden_TM = self._enter(stream)
        layers = range(self._frozen, self._decoder.config.msa.routed_layers[-1] + 1)
        run_layers(self._decoder, rows, hidden_TM, layers, want=want, see=see)

    def _document_keys(self, stream: Stream) -> list[torch.Tensor]:
        """fp32 [C, E] of every routed layer, filler's chunks behind."""
        msa = self._decoder.config.msa
        pooling = Pooling(stream.lengths, msa.pool_tokens, self._decoder.device)
        keys: list[torch.Tensor] = []

        def keep(_index: int, projected: Projected) -> None:
            assert projected.routing_TKD is not None
            keys.append(routing_keys(pooling, projected.routing_TKD, msa))

        self._routed(stream, Want.ROUTING_KEY, keep)
        return keys

    def _query_vectors(self, batch: Batch) -> list[torch.Tensor]:
        """fp32 [Q, S, E] of every routed layer."""
        c = self._decoder.config
        vectors: list[torch.Tensor] = []

        def keep(_index: int, projected: Projected) -> None:
            assert projected.routing_THD is not None
            vectors_TE = mean_heads(scaled_query(projected.routing_THD, c.msa), c.num_kv_heads)
            vectors.append(take_slots(vectors_TE, batch.slots_QS, batch.place_T))

        self._routed(batch.queries, Want.ROUTING_QUERY, keep)
        return vectors

    def _chunk_places(self, stream: Stream) -> torch.Tensor:
        """[D, X]: places of each document's chunks, its first one repeated to fill up."""
        pool = self._decoder.config.msa.pool_tokens
        counts = -(-np.array(stream.lengths) // pool)
        starts = np.cumsum(counts) - counts
        counts, starts = counts[: stream.used, None], starts[: stream.used, None]
        place = np.arange(int(counts.max()))[None, :]
        places = np.where(place < counts, starts + place, starts)
        return moved(torch.from_numpy(places), self._decoder.device)

    def _answer_logits(self, stream: Stream, at_A: torch.Tensor) -> torch.Tensor:
        rows, hidden_TM = self._enter(stream)
        layers = range(self._frozen, self._decoder.config.num_layers)
        hidden_TM = run_layers(self._decoder, rows, hidden_TM, layers)
        return self._decoder.logits(hidden_TM[at_A])
