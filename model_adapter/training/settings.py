"""What a run is: read from a TOML file, every key checked (docs/training.md lists them)."""

from __future__ import annotations

import hashlib
import json
import tomllib
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

from model_adapter.msa.config import LayerChoice, QueryReduce
from model_adapter.training.errors import SettingsError


@dataclass(frozen=True)
class Weights:
    """Share of each loss. layers: supervised contrastive, mean over routed layers (L_aux of
    paper section 3.3). combined: the same on the mean of all layers' scores. teacher: KL from
    the teacher's softmax over the batch. answer: next-token loss on answers (L_LM)."""

    layers: float
    combined: float
    teacher: float
    answer: float


@dataclass(frozen=True)
class Recipe:
    """Losses of the warm-up steps and of the rest, and the layers' temperature.

    temperature: of cosines. The combined score has a learned one that starts at 0.03.
    """

    warm_up: Weights
    main: Weights
    temperature: float = 0.05


#: paper: section 3.3 as published. tried: what docs/training.md measured.
RECIPES = {
    "paper": Recipe(
        warm_up=Weights(layers=1.0, combined=0.0, teacher=0.0, answer=0.1),
        main=Weights(layers=0.1, combined=0.0, teacher=0.0, answer=1.0),
    ),
    "tried": Recipe(
        warm_up=Weights(layers=0.3, combined=1.0, teacher=1.0, answer=0.3),
        main=Weights(layers=0.3, combined=1.0, teacher=1.0, answer=0.3),
    ),
}


@dataclass(frozen=True)
class SourceSettings:
    """One training set. weight: its share of draws, before normalising; pseudo_weight: of
    draws that ask a made-up question. pseudo: made-up questions per document. extractive:
    the answer is a span of the document, so a question whose answer was cut off is dropped.
    max_document: tokens, 0 for the run's."""

    name: str
    licence: str
    attribution: str
    weight: float
    pseudo_weight: float = 0.0
    pseudo: int = 3
    max_documents: int = 0
    max_document: int = 0
    extractive: bool = False
    answers: float = 0.0


@dataclass(frozen=True)
class Settings:
    """One run. Paths are as given; `data` holds the sets, `run` takes all that is written.

    seed, steps: with the prepared sets they determine every batch. sets_seed: what is made up
    and held out in preparing, so that runs of several seeds share it. *_tokens: of one step.
    evaluated:
    held-out questions per set that a run asks as it goes. batch_processes: that make batches
    ahead, 0 for two threads.
    first_delta_layer: lowest layer with a delta; those below run without gradients.
    words: BM25's share in what the teacher says, 1 without MiniLM (teacher false); 0 for none.
    """

    data: Path
    run: Path
    sources: tuple[SourceSettings, ...]
    base: str = "default"
    name: str = "SmolLM2-135M-Instruct"
    licence: str = "Apache-2.0"
    cache: Path = Path(".data")
    evaluation: tuple[str, ...] = ("eval_*", "mem_*", "bank_*", "conv_*")
    recipe: str = "tried"
    seed: int = 1
    sets_seed: int = 1
    steps: int = 1000
    warm_up_steps: int = 40
    routed_layers: tuple[int, ...] = tuple(range(18, 30))
    pool_tokens: int = 32
    top_k: int = 16
    query_reduce: QueryReduce = QueryReduce.MAX
    layer_choice: LayerChoice = LayerChoice.COMBINED
    first_delta_layer: int = 0
    rank: int = 64
    router_init: str = "random"
    delta_rate: float = 1.2e-3
    router_rate: float = 1e-3
    weight_decay: float = 0.01
    document_tokens: int = 49152
    query_tokens: int = 10240
    answer_tokens: int = 12288
    max_document: int = 255
    max_question: int = 31
    max_answer_row: int = 512
    queries_per_document: int = 1
    neighbours: int = 12
    companions: int = 5
    refusals: float = 0.1
    dialogues: int = 400
    dialogue_weight: float = 0.05
    sessions: int = 0
    session_weight: float = 0.03
    max_session: int = 640
    teacher: bool = True
    words: float = 0.0
    held_out: int = 200
    held_out_bank: int = 600
    checkpoint_every: int = 100
    evaluate_every: int = 200
    evaluated: int = 100
    int8: bool = True
    device: str = "auto"
    compile: bool = True
    threads: int = 0
    batch_processes: int = 0

    def __post_init__(self) -> None:
        """Raises SettingsError."""
        if self.recipe not in RECIPES:
            raise SettingsError(f"recipe {self.recipe!r:.40} is none of {', '.join(RECIPES)}")
        if self.router_init not in ("random", "values"):
            raise SettingsError("router_init is neither random nor values")
        if not self.sources:
            raise SettingsError("no [[sources]]")
        positive = ("steps", "pool_tokens", "document_tokens", "query_tokens", "max_document")
        for key in (*positive, "max_question", "queries_per_document", "checkpoint_every"):
            if getattr(self, key) < 1:
                raise SettingsError(f"{key} is below 1")
        for key in (
            "warm_up_steps",
            "rank",
            "answer_tokens",
            "companions",
            "held_out",
            "evaluated",
            "dialogues",
            "sessions",
            "batch_processes",
        ):
            if getattr(self, key) < 0:
                raise SettingsError(f"{key} is negative")
        if not 0 <= self.words <= 1:
            raise SettingsError("words is not between 0 and 1")
        if not any(s.weight > 0 or s.pseudo_weight > 0 for s in self.sources):
            raise SettingsError("no source has a weight")

    @property
    def losses(self) -> Recipe:
        """The named recipe; without any teacher, their loss is left out."""
        recipe = RECIPES[self.recipe]
        if self.teacher or self.words:
            return recipe
        return replace(
            recipe,
            warm_up=replace(recipe.warm_up, teacher=0.0),
            main=replace(recipe.main, teacher=0.0),
        )

    @property
    def shaping(self) -> dict[str, Any]:
        """All that shapes the weights."""
        return {key: held for key, held in asdict(self).items() if key not in _NOT_OF_WEIGHTS}

    @property
    def fingerprint(self) -> str:
        """64 hex digits over all that shapes the weights; a checkpoint of another one is
        not continued."""
        held = json.dumps(self.shaping, sort_keys=True, default=str)
        return hashlib.sha256(held.encode()).hexdigest()


_NOT_OF_WEIGHTS = (
    "data",
    "run",
    "cache",
    "name",
    "licence",
    "checkpoint_every",
    "evaluate_every",
    "evaluated",
    "int8",
    "threads",
    "batch_processes",
)


def read_settings(path: Path, overrides: dict[str, str]) -> Settings:
    """A TOML file and KEY=VALUE overrides, whose values are TOML too (bare words are texts).

    Raises SettingsError.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"{path} cannot be read: {error}") from error
    for key, text in overrides.items():
        try:
            raw[key] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            raw[key] = text
    made: Settings = _build(Settings, raw, str(path))
    return made


def _build(kind: type[Any], raw: dict[str, Any], where: str) -> Any:
    hints = get_type_hints(kind)
    known = {item.name: item for item in fields(kind)}
    unknown = set(raw) - set(known)
    if unknown:
        raise SettingsError(f"{where}: unknown key {sorted(unknown)[0]!r:.60}")
    values: dict[str, Any] = {}
    for name, item in known.items():
        if name in raw:
            values[name] = _value(hints[name], raw[name], f"{where}: {name}")
        elif item.default is MISSING and item.default_factory is MISSING:
            raise SettingsError(f"{where}: {name} is missing")
    return kind(**values)


def _value(hint: Any, value: Any, where: str) -> Any:
    if getattr(hint, "__origin__", None) is tuple:
        if not isinstance(value, list):
            raise SettingsError(f"{where} is not a list")
        (item, _) = hint.__args__
        return tuple(_value(item, one, where) for one in value)
    if is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, dict):
            raise SettingsError(f"{where} is not a table")
        return _build(hint, value, where)
    if hint is float and type(value) is int:
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if isinstance(hint, type) and issubclass(hint, (QueryReduce, LayerChoice)):
        if value not in list(hint):
            raise SettingsError(f"{where}: {value!r:.40} is none of {', '.join(hint)}")
        return hint(value)
    if type(value) is not hint:
        raise SettingsError(f"{where}: {value!r:.60} is not {hint.__name__}")
    return value
