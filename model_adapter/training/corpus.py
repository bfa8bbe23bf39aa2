"""Everything that batches are drawn from: tokenised once, with the teacher's vectors.

A document has a place in `documents`, a query one in `queries`; all else is arrays by place.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load_file

from model_adapter.checkpoints.adapter_header import TrainingSource
from model_adapter.msa.prompt import PromptBuilder
from model_adapter.training import dialogue, prepared
from model_adapter.training.data import Document, Query, QuestionSet, read_set
from model_adapter.training.hygiene import Evaluation, clean
from model_adapter.training.pseudo import PseudoQuestions
from model_adapter.training.settings import Settings, SourceSettings
from model_adapter.training.teacher import Embeddings, Teacher, nearest
from model_adapter.training.words import WordScores

log = logging.getLogger(__name__)

#: Largest document number that training shows; drawn so that each length is as frequent.
MAX_NUMBER = 30000


@dataclass
class Corpus:
    """placed, source_N and scope_N: the set (its place in sources) and the scope of each
    document; documents of one set without scopes share one.
    pools: places of queries by (source, made up). asked_N: queries by gold document."""

    sources: list[SourceSettings] = field(default_factory=list)
    documents: list[Document] = field(default_factory=list)
    tokens: list[tuple[int, ...]] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    placed: list[int] = field(default_factory=list)
    source_N: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    scope_N: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    queries: list[Query] = field(default_factory=list)
    held_out: list[Query] = field(default_factory=list)
    pools: dict[tuple[int, bool], list[int]] = field(default_factory=dict)
    asked_N: list[list[int]] = field(default_factory=list)
    neighbours_NX: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 0), np.int64))
    document_vectors: Embeddings | None = None
    query_vectors: Embeddings | None = None
    words: WordScores | None = None
    report: tuple[TrainingSource, ...] = ()


def build(
    settings: Settings, prompts: PromptBuilder, device: torch.device, base_sha256: str
) -> Corpus:
    """Reads, cleans, tokenises and embeds all sets, or reads what an earlier start made of them.

    base_sha256: of the base whose tokens they become. Raises TrainingError.
    """
    patterns = (settings.data.glob(pattern) for pattern in settings.evaluation)
    evaluation = sorted({file for files in patterns for file in files})
    path = prepared.file_of(settings, evaluation, base_sha256)
    if not path.is_file():
        prepared.write(path, _prepare(settings, prompts, evaluation))
    log.info("the sets are in %s", path)
    held = prepared.read(path)
    corpus = Corpus(
        sources=[*settings.sources, *(source for source, _ in _generated(settings))],
        documents=held.documents,
        tokens=held.tokens,
        numbers=held.numbers,
        placed=held.placed,
        queries=held.queries,
        held_out=held.held_out,
    )
    _index(corpus)
    _embed(corpus, settings, device)
    _weigh_words(corpus, settings)
    corpus.report = _report(corpus)
    return corpus


def _prepare(
    settings: Settings, prompts: PromptBuilder, evaluation: Sequence[Path]
) -> prepared.Prepared:
    sets = [read_set(settings.data, source.name) for source in settings.sources]
    cleaned, sources = [], list(settings.sources)
    for kept, dropped in clean(sets, Evaluation.read(evaluation)):
        log.info("%s: dropped %s", kept.name, dropped)
        cleaned.append(kept)
    for source, generate in _generated(settings):
        cleaned.append(generate())
        sources.append(source)
    preparing = _Preparing(prepared.Prepared(), settings, prompts)
    for place, (source, kept) in enumerate(zip(sources, cleaned, strict=True)):
        preparing.take(source, place, kept)
    return preparing.made


def _generated(settings: Settings) -> list[tuple[SourceSettings, Callable[[], QuestionSet]]]:
    """Sets that are made up: how they are drawn from, and what makes them."""
    s = settings
    made: list[tuple[SourceSettings, Callable[[], QuestionSet]]] = []
    if s.dialogues:
        turns = _made_up(dialogue.NAME, s.dialogue_weight)
        made.append((turns, lambda: dialogue.generate(s.dialogues, s.sets_seed)))
    if s.sessions:
        sessions = _made_up(dialogue.SESSIONS_NAME, s.session_weight, s.max_session)
        made.append((sessions, lambda: dialogue.generate_sessions(s.sessions, s.sets_seed)))
    return made


def _made_up(name: str, weight: float, max_document: int = 0) -> SourceSettings:
    return SourceSettings(
        name=name,
        licence="Apache-2.0",
        attribution="made from templates in model_adapter/training/dialogue.toml",
        weight=weight,
        pseudo_weight=weight / 4,
        pseudo=1,
        max_document=max_document,
        answers=weight,
    )


@dataclass(frozen=True)
class _Preparing:
    """Adds sets to what was prepared so far."""

    made: prepared.Prepared
    settings: Settings
    prompts: PromptBuilder

    def take(self, source: SourceSettings, place: int, kept: QuestionSet) -> None:
        """Adds a set: its documents, questions and made-up questions; holds some out."""
        made, settings, prompts = self.made, self.settings, self.prompts
        rng = np.random.default_rng([settings.sets_seed, place, 0x5E7])
        longest = source.max_document or settings.max_document
        chosen = list(kept.documents.values())
        asked = {id_ for question in kept.questions for id_ in question.gold}
        if source.max_documents and len(chosen) > source.max_documents:
            order = rng.permutation(len(chosen))
            ranked = sorted(order, key=lambda n: chosen[n].id not in asked)  # answered ones first
            chosen = [chosen[n] for n in sorted(ranked[: source.max_documents])]
        first = len(made.documents)
        places = {document.id: first + n for n, document in enumerate(chosen)}
        cut: dict[int, str] = {}
        for document in chosen:
            number = int(np.exp(rng.uniform(0, np.log(MAX_NUMBER))))
            ids, whole = document_tokens(prompts, number, document.text, longest)
            if not whole:
                cut[len(made.documents)] = prompts.decode(ids).lower()
            made.documents.append(document)
            made.numbers.append(number)
            made.placed.append(place)
            made.tokens.append(ids)
        found = []
        for question in kept.questions:
            if not all(id_ in places for id_ in question.gold):
                continue
            gold = tuple(places[id_] for id_ in question.gold)
            lost = [n for n in gold if n in cut and not _holds(cut[n], question.answers)]
            if source.extractive and lost:
                continue
            ids = query_tokens(prompts, question.text, settings.max_question)
            found.append(Query(question.text, ids, gold, question.answers, place, made_up=False))
        count = min(settings.held_out, len(found) // 10)
        held = set(rng.permutation(len(found))[:count].tolist())
        made.held_out.extend(query for n, query in enumerate(found) if n in held)
        made.queries.extend(query for n, query in enumerate(found) if n not in held)
        if source.pseudo_weight > 0:
            self._ask_more(source, place, chosen, rng)

    def _ask_more(
        self,
        source: SourceSettings,
        place: int,
        chosen: Sequence[Document],
        rng: np.random.Generator,
    ) -> None:
        maker = PseudoQuestions(chosen)
        first = len(self.made.documents) - len(chosen)
        for n, document in enumerate(chosen, start=first):
            for text in {maker.make(document, rng): None for _ in range(source.pseudo)}:
                if text:
                    ids = query_tokens(self.prompts, text, self.settings.max_question)
                    self.made.queries.append(Query(text, ids, (n,), (), place, made_up=True))


def document_tokens(
    prompts: PromptBuilder, number: int, text: str, limit: int
) -> tuple[tuple[int, ...], bool]:
    """A document as it is encoded, its end put on again where it was cut; whether it is whole."""
    ids = prompts.document(number, text)
    if len(ids) <= limit:
        return tuple(ids), True
    tail = [*prompts.text(f"[{number}]"), *prompts.template.turn_end]
    return (*ids[: limit - len(tail)], *tail), False


def query_tokens(prompts: PromptBuilder, text: str, limit: int) -> tuple[int, ...]:
    """The voting part of a question's row; cut before its last token."""
    ids = prompts.question(text)[0].ids
    return tuple(ids) if len(ids) <= limit else (*ids[: limit - 1], ids[-1])


def _holds(text: str, answers: Sequence[str]) -> bool:
    return any(answer.lower() in text for answer in answers)


def _index(corpus: Corpus) -> None:
    corpus.asked_N = [[] for _ in corpus.documents]
    for n, query in enumerate(corpus.queries):
        corpus.pools.setdefault((query.source, query.made_up), []).append(n)
        for document in query.gold:
            corpus.asked_N[document].append(n)
    corpus.source_N = np.array(corpus.placed, dtype=np.int64)
    scopes: dict[tuple[int, str], int] = {}
    keys = zip(corpus.placed, (document.scope for document in corpus.documents), strict=True)
    corpus.scope_N = np.array([scopes.setdefault(key, len(scopes)) for key in keys])


def _embed(corpus: Corpus, settings: Settings, device: torch.device) -> None:
    """The teacher's vectors and neighbours, kept beside the sets under the texts' hash."""
    if not settings.teacher:
        corpus.neighbours_NX = np.full((len(corpus.documents), 0), -1, dtype=np.int64)
        return
    texts, asked = _texts(corpus)
    shaping = [str(settings.max_document), str(settings.neighbours), *texts, *asked]
    path = prepared.named(settings, "teacher", shaping, corpus.scope_N.tobytes())
    if not path.is_file():
        teacher = Teacher(device, settings.max_document)
        vectors = teacher.embed(texts + asked, _log_progress)
        documents = vectors[: len(texts)]
        near = nearest(documents, settings.neighbours, corpus.scope_N, device)
        arrays: prepared.Arrays = {
            "documents": documents,
            "queries": vectors[len(texts) :],
            "near": near,
        }
        prepared.write_arrays(path, arrays)
    held = load_file(path)
    corpus.document_vectors, corpus.query_vectors = held["documents"], held["queries"]
    corpus.neighbours_NX = held["near"]


def _weigh_words(corpus: Corpus, settings: Settings) -> None:
    """BM25 of all questions and documents, kept as the teacher's vectors are."""
    if not settings.words:
        return
    texts, asked = _texts(corpus)
    path = prepared.named(settings, "words", [*texts, *asked])
    if not path.is_file():
        prepared.write_arrays(path, WordScores.build(texts, asked).pack())
    corpus.words = WordScores.unpack(load_file(path))


def _texts(corpus: Corpus) -> tuple[list[str], list[str]]:
    documents = [document.text for document in corpus.documents]
    return documents, [query.text for query in corpus.queries]


def _log_progress(done: int, total: int) -> None:
    if done == total or done % 8192 < 256:
        log.info("teacher: %d of %d texts", done, total)


def _report(corpus: Corpus) -> tuple[TrainingSource, ...]:
    return tuple(
        TrainingSource(
            name=source.name,
            licence=source.licence,
            attribution=source.attribution,
            questions=len(corpus.pools.get((place, False), ())),
            documents=int((corpus.source_N == place).sum()),
        )
        for place, source in enumerate(corpus.sources)
    )
