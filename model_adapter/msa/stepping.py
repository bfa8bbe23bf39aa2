"""One step of all running answers: which of them run, in which passes, and what they are told.

All rows that only go on share a pass, and so do all that route: a pass costs the host about as much
for one row as for many. How many tokens of prompts a step takes is bounded, so that answers which
are being written go on meanwhile; prompts beyond that wait for the next step, first come first
served.

Shape suffixes are those of model.py; R rows of a pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from model_adapter.engine import EngineError, Event
from model_adapter.msa.forward import Outcome, Segment, run
from model_adapter.msa.generate import Session, Told
from model_adapter.msa.model import Decoder
from model_adapter.msa.packed import moved

#: Tokens of prompts in a step on a CPU; enough to keep it busy.
_CPU_TOKENS = 512
#: On a GPU: about a tenth of a second of its products, and fewest and most whatever the model.
_GPU_FLOP, _FEWEST_TOKENS, _MOST_TOKENS = 3e13, 2048, 32768


def prefill_tokens(decoder: Decoder) -> int:
    """Tokens of prompts that a step takes; a single longer prompt is taken alone."""
    if decoder.device.type == "cpu":
        return _CPU_TOKENS
    matrices = [m for one in decoder.layers for m in (one.fused, one.out, one.gate_up, one.down)]
    flop = 2 * sum(matrix.numel() for matrix in matrices)
    return int(min(max(_GPU_FLOP / flop, _FEWEST_TOKENS), _MOST_TOKENS))


@dataclass
class Step:
    """What became of each session, by its place. One that waits has nothing."""

    events: dict[int, list[Event]] = field(default_factory=dict)
    errors: dict[int, EngineError] = field(default_factory=dict)


def advance(decoder: Decoder, sessions: Sequence[Session], most_tokens: int) -> Step:
    """Advances each by one unit, but for those whose prompts wait.

    A memory that cannot be read ends its row alone.
    """
    step = Step()
    segments = _running(sessions, most_tokens)
    for places in _passes(sessions, segments):
        routes_only = sessions[places[0]].only_routes
        try:
            own = [segments[place] for place in places]
            outcome = run(decoder, own, only_routing=routes_only)
        except EngineError as error:
            if len(places) > 1:  # nothing of a shared pass belongs to one row
                raise
            _fail(step, sessions, places[0], error)
            continue
        _tell(step, sessions, places, outcome)
    return step


def _running(sessions: Sequence[Session], most_tokens: int) -> dict[int, Segment]:
    """Segments of this step by place."""
    running, left = {}, most_tokens
    for place, session in enumerate(sessions):
        segment = session.upcoming()
        size = len(segment.ids)
        if size > 1:
            if size > left and left < most_tokens:
                left = 0  # so that none that came later passes it
                continue
            left -= size
        running[place] = segment
    return running


def _passes(sessions: Sequence[Session], segments: dict[int, Segment]) -> list[list[int]]:
    """Places of the rows that run together: that go on, that route to stop there, that route."""
    kinds: tuple[list[int], ...] = ([], [], [])
    for place, segment in segments.items():
        kind = 0 if segment.routing is None else 1 if sessions[place].only_routes else 2
        kinds[kind].append(place)
    return [places for places in kinds if places]


def _tell(step: Step, sessions: Sequence[Session], places: Sequence[int], outcome: Outcome) -> None:
    asking = [sessions[place] for place in places]
    rows_V: Sequence[torch.Tensor | None] = [None] * len(places)
    told = [Told()] * len(places)
    if outcome.logits is not None:
        rows_V, told = _looked_at(asking, outcome.logits)
    for place, logits_V, routing, known in zip(places, rows_V, outcome.routings, told, strict=True):
        try:
            if routing is not None and routing.error is not None:
                raise routing.error
            step.events[place] = sessions[place].advance(logits_V, routing, known)
        except EngineError as error:
            _fail(step, sessions, place, error)


def _looked_at(
    sessions: Sequence[Session], logits_RV: torch.Tensor
) -> tuple[list[torch.Tensor | None], list[Told]]:
    """Each row's logits, and what is known of them: a wait for the device for all rows, and one
    more where some draw their tokens or wonder about one."""
    best = logits_RV.argmax(dim=-1).tolist()
    rows_V: list[torch.Tensor | None] = list(logits_RV.unbind(0))
    drawing = [row for row, session in enumerate(sessions) if session.samples]
    if drawing and logits_RV.device.type != "cpu":
        for row, logits_V in zip(drawing, logits_RV[_there(drawing, logits_RV)].cpu(), strict=True):
            rows_V[row] = logits_V
    wondering = {
        row: token for row, one in enumerate(sessions) if (token := one.wonders) is not None
    }
    share = dict[int, float]()
    if wondering:
        row_X, token_X = _there([list(wondering), list(wondering.values())], logits_RV)
        shares = logits_RV[row_X].softmax(-1).gather(1, token_X[:, None]).flatten()
        share = dict(zip(wondering, shares.tolist(), strict=True))
    return rows_V, [Told(token, share.get(row)) for row, token in enumerate(best)]


def _there(numbers: Sequence[object], like: torch.Tensor) -> torch.Tensor:
    return moved(torch.from_numpy(np.array(numbers, np.int64)), like.device)


def _fail(step: Step, sessions: Sequence[Session], place: int, error: EngineError) -> None:
    sessions[place].fail()
    step.errors[place] = error
