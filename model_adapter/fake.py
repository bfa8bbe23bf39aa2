"""A deterministic engine for tests: real blocks and real routing, no model.

A token is a word. A document's routing keys are hashed bags of words, one per
chunk, so that the inner product with a question counts the words they share
(frequent words weigh an eighth). Content KV carries a fingerprint of the document
that is checked whenever a document is chosen, so a wrong, stale or swapped
block is noticed. The answer quotes the best documents word by word.

Shape suffixes as in `storage.layout`; W words.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from functools import lru_cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from model_adapter.blending import DEPTH, blend
from model_adapter.engine import (
    Arrange,
    CitationEvent,
    Counts,
    DocumentText,
    DocumentTooLongError,
    Encoded,
    EncodeFailure,
    EngineError,
    Event,
    FinishEvent,
    FinishReason,
    Generate,
    Generation,
    LayerScore,
    LexicalPrior,
    MemoryView,
    ModelDescription,
    QuestionTooLongError,
    RankedDocument,
    RoutingEvent,
    StepResult,
    TextEvent,
)
from storage.layout import Bits, KVBlock, KVLayout

NOTHING_FOUND = "I found nothing about that."
_SPOTS = 4  # coordinates that a word sets in a routing key
#: Words count by accident too, where hashes collide: a document is relevant above this.
#: One shared word alone adds about 1 in each layer.
_RELEVANT = 0.75
_FREQUENT_TEXT = """
a about am an and any are as at be been but by can could did do does for from had has have he her
his how i if in is it its me my no not of on or our she so that the their them there they this to
us was we were what when where which who whom whose why will with would you your
"""
_FREQUENT = frozenset(_FREQUENT_TEXT.split())


@dataclass(frozen=True)
class FakeSpec:
    """Parameters of a fake engine. Times in milliseconds, limits in words.

    name: makes another model of it, with another identity. pool_tokens: of the layout,
    which is part of the identity too. step_ms and route_ms count per call, encode_ms per
    document.
    """

    name: str = ""
    step_ms: float = 0.0
    route_ms: float = 0.0
    encode_ms: float = 0.0
    max_document_tokens: int = 262_144
    max_question_tokens: int = 1_024
    max_answer_tokens: int = 256
    top_k: int = 5
    pool_tokens: int = 16
    lexical_weight: float = 0.0

    @classmethod
    def parse(cls, text: str) -> FakeSpec:
        """Reads "fake" or "fake:key=value,key=value". Raises ValueError."""
        head, _, rest = text.partition(":")
        if head != "fake":
            raise ValueError(f"not a fake engine: {head!r}")
        kinds = {f.name: {"str": str, "float": float, "int": int}[str(f.type)] for f in fields(cls)}
        values: dict[str, str | float | int] = {}
        for item in filter(None, rest.split(",")):
            key, equals, value = item.partition("=")
            if key not in kinds or not equals:
                raise ValueError(f"unknown parameter of the fake engine: {item!r}")
            values[key] = kinds[key](value)
        if int(values.get("pool_tokens", 1)) < 1:
            raise ValueError("pool_tokens is at least 1")
        return cls(**values)  # type: ignore[arg-type]  # each value was made by its field's kind


def _words(text: str) -> list[str]:
    return text.split() or [""]


@lru_cache(maxsize=65_536)
def _spots(word: str, salt: int, width: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Coordinates of a word and what it adds there; punctuation and case do not count."""
    key = re.sub(r"\W", "", word).lower()
    digest = hashlib.blake2b(f"{salt}:{key}".encode(), digest_size=3 * _SPOTS).digest()
    weight = 0.0 if not key else 0.125 if key in _FREQUENT else 1.0
    spots = tuple(int.from_bytes(digest[3 * i : 3 * i + 2]) % width for i in range(_SPOTS))
    signs = tuple(weight if digest[3 * i + 2] & 1 else -weight for i in range(_SPOTS))
    return spots, signs


def _bag_CE(
    words: Sequence[str], salt: int, layout: KVLayout, pool: int
) -> npt.NDArray[np.float32]:
    """Sums of the words' vectors over each `pool` of them."""
    bag = np.zeros((-(-len(words) // pool), layout.width), np.float32)
    found = [_spots(word, salt, layout.width) for word in words]
    rows = np.repeat(np.arange(len(words)) // pool, _SPOTS)
    columns = np.array([spot for spots, _ in found for spot in spots])
    np.add.at(bag, (rows, columns), np.array([sign for _, signs in found for sign in signs]))
    return bag


def _bf16(values: npt.NDArray[np.float32]) -> Bits:
    """bf16 bits by truncation, exact for what this engine stores."""
    return (values.view(np.uint32) >> 16).astype("<u2")


def _still_there(memory: MemoryView, numbers: Sequence[int]) -> list[DocumentText]:
    """Those of the documents that were not deleted since they were routed."""
    found = []
    for number in numbers:
        with suppress(KeyError):
            found.append(DocumentText(number, memory.text(number)))
    return found


@dataclass
class _Running:
    """State of one query: what is still to be said, and what was cited."""

    request: Generate
    memory: MemoryView
    limit: int
    counts: Counts = field(default_factory=Counts)
    round: int = 0
    relevant_left: bool = True
    cited: list[int] = field(default_factory=list)
    left: list[str] | None = None
    finished: bool = False

    @property
    def done(self) -> bool:
        return self.finished


class FakeEngine:
    """See the module's text. Same input, same blocks, same answer."""

    def __init__(self, spec: FakeSpec | None = None) -> None:
        self._spec = spec or FakeSpec()
        self._layout = KVLayout(
            routed_layers=(1, 3),
            kv_heads=8,
            head_dim=64,
            pool_tokens=self._spec.pool_tokens,
            dtype="bf16",
            separate_routing_keys=True,
        )
        name = f"fake-{self._spec.name}" if self._spec.name else "fake"
        self._identity = hashlib.sha256(f"{name}/1/{self._layout}".encode()).hexdigest()
        self._description = ModelDescription(
            model_id=name,
            display_name="Deterministic engine for tests",
            identity=self._identity,
            layout=self._layout,
            max_document_tokens=self._spec.max_document_tokens,
            max_question_tokens=self._spec.max_question_tokens,
            max_answer_tokens=self._spec.max_answer_tokens,
            device="cpu",
            compute_dtype="fp32",
            lexical_weight=self._spec.lexical_weight,
        )

    @property
    def description(self) -> ModelDescription:
        """Its identity changes with the name and pool_tokens alone."""
        return self._description

    def encode(self, documents: Sequence[DocumentText]) -> Encoded:
        """Refuses a document of too many words; the others go on."""
        encoded = Encoded()
        for document in documents:
            time.sleep(self._spec.encode_ms / 1000)
            actual, limit = len(_words(document.text)), self._spec.max_document_tokens
            if actual > limit:
                error = DocumentTooLongError("too many words", limit=str(limit), actual=str(actual))
                encoded.failures.append(EncodeFailure(document.number, error))
            else:
                encoded.blocks.append(self._block(document))
        return encoded

    def route(
        self,
        question: str,
        memory: MemoryView,
        limit: int,
        prior: LexicalPrior | None = None,
        arrange: Arrange | None = None,
    ) -> list[RankedDocument]:
        """Documents that share a word with the question, best first."""
        time.sleep(self._spec.route_ms / 1000)
        words = self._question_words(question)

        def rank(most: int) -> list[RankedDocument]:
            return self._rank(words, memory, most, frozenset(), prior)[0]

        return rank(limit) if arrange is None else list(arrange(rank, limit))

    def start(self, request: Generate, memory: MemoryView) -> Generation:
        """Counts the question's words; everything else is left to `step`."""
        own = self._spec.max_answer_tokens
        running = _Running(request, memory, min(request.max_answer_tokens or own, own))
        running.counts.question_tokens = len(self._question_words(request.question))
        return running

    def step(self, generations: Sequence[Generation]) -> list[StepResult]:
        """One round of routing, or one word, each."""
        time.sleep(self._spec.step_ms / 1000)
        results = []
        for generation in generations:
            assert isinstance(generation, _Running) and not generation.finished
            try:
                events = tuple(self._advance(generation))
                results.append(StepResult(generation, events))
            except EngineError as error:
                generation.finished = True
                results.append(StepResult(generation, (), error))
        return results

    def settle(self) -> None:
        """Generations leave nothing here."""

    def _question_words(self, question: str) -> list[str]:
        words, limit = _words(question), self._spec.max_question_tokens
        if len(words) > limit:
            raise QuestionTooLongError("too many words", limit=str(limit), actual=str(len(words)))
        return words

    def _block(self, document: DocumentText) -> KVBlock:
        words, pool = _words(document.text), self._layout.pool_tokens
        layers = range(len(self._layout.routed_layers))
        routing = np.stack([_bag_CE(words, layer, self._layout, pool) for layer in layers])
        seed = hashlib.blake2b(
            f"{self._identity}:{document.number}:{document.text}".encode(), digest_size=8
        ).digest()
        draw = np.random.default_rng(int.from_bytes(seed))
        key, value = draw.integers(-128, 128, (2, *routing.shape)).astype(np.float32)
        return KVBlock(document.number, len(words), _bf16(routing), _bf16(key), _bf16(value))

    def _rank(
        self,
        words: Sequence[str],
        memory: MemoryView,
        limit: int,
        without: frozenset[int],
        prior: LexicalPrior | None,
    ) -> tuple[list[RankedDocument], int]:
        """Relevant documents, best first, and how many there were."""
        numbers_N = memory.numbers_N
        if not len(numbers_N):
            return [], 0
        scores_LN = np.stack(
            [
                self._layer_scores(words, memory, layer)
                for layer in range(len(self._layout.routed_layers))
            ]
        )
        rank_LN = (-scores_LN).argsort(axis=1, kind="stable").argsort(axis=1) + 1
        total_N = scores_LN.sum(axis=0)
        left = [n for n in range(len(numbers_N)) if int(numbers_N[n]) not in without]
        best = sorted((n for n in left if total_N[n] > _RELEVANT), key=lambda n: -total_N[n])
        order, lexical = [(n, float(total_N[n])) for n in best[:limit]], dict[int, float]()
        if prior is not None:
            found = prior.scores
            lexical = {n: found[int(numbers_N[n])] for n in left if int(numbers_N[n]) in found}
            routed = {n: float(total_N[n]) for n in best[: max(limit, DEPTH)]}
            order = blend(routed, lexical, prior.weight, limit)
        ranked = [
            RankedDocument(
                int(numbers_N[n]),
                score,
                tuple(
                    LayerScore(model_layer, int(rank_LN[layer, n]), float(scores_LN[layer, n]))
                    for layer, model_layer in enumerate(self._layout.routed_layers)
                ),
                float(total_N[n]),
                lexical.get(n, 0.0),
            )
            for n, score in order
        ]
        return ranked, len(best)

    def _layer_scores(
        self, words: Sequence[str], memory: MemoryView, layer: int
    ) -> npt.NDArray[np.float32]:
        """[N]: best chunk of each document."""
        query_E = torch.from_numpy(_bag_CE(words, layer, self._layout, len(words))[0])
        scores_C = torch.cat(
            [keys_CE.float().cpu() @ query_E for _, keys_CE in memory.routing_keys(layer)]
        ).numpy()
        offsets = memory.chunk_offsets_N1
        assert len(scores_C) == offsets[-1]
        best = [scores_C[first:end].max() / _SPOTS for first, end in pairwise(offsets)]
        return np.array(best, np.float32)

    def _advance(self, running: _Running) -> list[Event]:
        rounds = max(running.request.max_rounds, 1)
        if running.left is None:
            if running.round < rounds and running.relevant_left:
                return self._retrieve(running)
            return self._begin_answer(running)
        if running.left and running.counts.answer_tokens < running.limit:
            running.counts.answer_tokens += 1
            gap = " " if running.counts.answer_tokens > 1 else ""
            return [TextEvent(gap + running.left.pop(0))]
        running.finished = True
        if running.left:
            return [FinishEvent(FinishReason.LENGTH)]
        if running.request.max_rounds and running.relevant_left:
            return [FinishEvent(FinishReason.ROUNDS)]
        return [FinishEvent(FinishReason.STOP)]

    def _retrieve(self, running: _Running) -> list[Event]:
        """One round: route, read the content of what was chosen, cite the best."""
        began = time.perf_counter()
        memory, counts = running.memory, running.counts
        running.round += 1
        words = _words(running.request.question)
        top_k = running.request.top_k or self._spec.top_k
        cited, prior = frozenset(running.cited), running.request.prior
        ranked, relevant = self._rank(words, memory, top_k, cited, prior)
        if arrange := running.request.arrange:
            ranked = list(arrange(lambda k: self._rank(words, memory, k, cited, prior)[0], top_k))
        self._check_content(memory, [document.number for document in ranked])
        counts.rounds = running.round
        counts.routed_documents = len(memory.numbers_N)
        counts.routed_chunks = int(memory.chunk_offsets_N1[-1])
        counts.routing_s += time.perf_counter() - began
        running.relevant_left = relevant > 1
        weight = prior.weight if prior else 0.0
        events: list[Event] = [RoutingEvent(running.round, tuple(ranked), weight)]
        if ranked:
            running.cited.append(ranked[0].number)
            for document in _still_there(memory, [ranked[0].number]):
                counts.document_tokens += len(_words(document.text))
            events.append(CitationEvent(ranked[0].number, running.round))
        return events

    def _begin_answer(self, running: _Running) -> list[Event]:
        cited = [document.text for document in _still_there(running.memory, running.cited)]
        running.left = [word for text in cited or [NOTHING_FOUND] for word in text.split()]
        return []

    def _check_content(self, memory: MemoryView, numbers: Sequence[int]) -> None:
        """Raises EngineError when content KV is not what `encode` makes of the text."""
        documents = _still_there(memory, numbers)
        if not documents:
            return
        positions = np.searchsorted(memory.numbers_N, [document.number for document in documents])
        blocks = [self._block(document) for document in documents]
        for layer in range(len(self._layout.routed_layers)):
            held = memory.content(layer, [int(p) for p in positions])
            key = np.concatenate([b.key_LCE[layer] for b in blocks if b.key_LCE is not None])
            value = np.concatenate([b.value_LCE[layer] for b in blocks])
            for got_CE, want_CE in zip(held, (key, value), strict=True):
                bits = got_CE.cpu().contiguous().view(torch.int16).numpy().view(np.uint16)
                if bits.shape != want_CE.shape or not (bits == want_CE).all():
                    raise EngineError(f"content of layer {layer} is not that of its documents")
