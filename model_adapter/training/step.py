"""One step's losses, by the functions that encode and route in serving.

Documents, questions and answer rows go through the layers together: what a step costs its
processor, which launches every operation of every layer, would be three times as much apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from model_adapter.msa.config import QueryReduce
from model_adapter.msa.encode import Pooling, routing_keys
from model_adapter.msa.model import Decoder, Projected, Want
from model_adapter.msa.packed import PackedRows, Rows, moved, run_layers
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
        keys, queries, logits_AV = self.forward(batch, answers=bool(weights.answer))
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
        taught_QD = losses.taught(batch.teacher_QD, batch.words_QD, self._settings.words)
        if weights.teacher and taught_QD is not None:
            parts["teacher"] = losses.distillation(combined_QD * scale, taught_QD)
        if logits_AV is not None:
            parts["answer"] = losses.answers(logits_AV, batch.targets_A)
        total = torch.stack([getattr(weights, name) * part for name, part in parts.items()]).sum()
        best_Q = combined_QD.masked_fill(relevance.ignored_QD, NEVER).argmax(dim=1)
        hits_Q = batch.positive_QD.gather(1, best_Q[:, None])
        parts["hits"] = hits_Q.float().mean()
        return Outcome(total, {name: part.detach() for name, part in parts.items()})

    def forward(
        self, batch: Batch, *, answers: bool
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor | None]:
        """fp32 document keys [C, E], filler's chunks behind, and query vectors [Q, S, E] of every
        routed layer; the logits [A, V] of answers, if asked for and if there are any."""
        decoder, msa = self._decoder, self._decoder.config.msa
        streams = [batch.documents, batch.queries]
        if answers and batch.answers is not None:
            streams.append(batch.answers)
        documents, asked = (len(stream.ids_T) for stream in streams[:2])
        rows = _rows(streams, decoder.device)
        pooling = Pooling(batch.documents.lengths, msa.pool_tokens, decoder.device)
        keys: list[torch.Tensor] = []
        queries: list[torch.Tensor] = []

        def keep(_index: int, projected: Projected) -> None:
            assert projected.routing_TKD is not None and projected.routing_THD is not None
            keys.append(routing_keys(pooling, projected.routing_TKD[:documents], msa))
            routing_THD = projected.routing_THD[documents : documents + asked]
            vectors_TE = mean_heads(scaled_query(routing_THD, msa), decoder.config.num_kv_heads)
            queries.append(take_slots(vectors_TE, batch.slots_QS, batch.place_T))

        with torch.no_grad():
            hidden_TM = decoder.embed(torch.cat([stream.ids_T for stream in streams]))
            hidden_TM = run_layers(decoder, rows, hidden_TM, range(self._frozen))
        answering = len(streams) > 2
        last = decoder.config.num_layers if answering else msa.routed_layers[-1] + 1
        layers = range(self._frozen, last)
        hidden_TM = run_layers(
            decoder, rows, hidden_TM, layers, want=Want.BOTH_ROUTING, see=keep, finish=answering
        )
        if not answering:
            return keys, queries, None
        return keys, queries, decoder.logits(hidden_TM[documents + asked + batch.at_A])

    def _chunk_places(self, stream: Stream) -> torch.Tensor:
        """[D, X]: places of each document's chunks, its first one repeated to fill up."""
        pool = self._decoder.config.msa.pool_tokens
        counts = -(-np.array(stream.lengths) // pool)
        starts = np.cumsum(counts) - counts
        counts, starts = counts[: stream.used, None], starts[: stream.used, None]
        place = np.arange(int(counts.max()))[None, :]
        places = np.where(place < counts, starts + place, starts)
        return moved(torch.from_numpy(places), self._decoder.device)


def _rows(streams: Sequence[Stream], device: torch.device) -> Rows:
    """The streams behind each other."""
    positions_T = torch.cat([stream.positions_T for stream in streams])
    end = max(stream.end for stream in streams)
    if device.type != "cpu":
        lengths = [length for stream in streams for length in stream.lengths]
        return PackedRows(lengths, device, (positions_T, end), training=True)
    parts = [PackedRows(stream.lengths, device, training=True) for stream in streams]
    return _Apart(parts, [len(stream.ids_T) for stream in streams], positions_T, end)


@dataclass(frozen=True)
class _Apart:
    """Streams that are attended to one by one: on a CPU, where sequences are padded to the
    longest of theirs, and questions are far shorter than documents."""

    parts: Sequence[PackedRows]
    tokens: list[int]
    position_T: torch.Tensor
    positions_end: int

    def attend(self, q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor) -> torch.Tensor:
        """Attention output [T, H, D]."""
        each = zip(*(torch.split(x, self.tokens) for x in (q_THD, k_TKD, v_TKD)), strict=True)
        return torch.cat([part.attend(*qkv) for part, qkv in zip(self.parts, each, strict=True)])
