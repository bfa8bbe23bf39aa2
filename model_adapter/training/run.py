"""A run from start to end: prepare, step, evaluate, checkpoint, export; and to continue one."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model_adapter.checkpoints import load_engine_source, write_adapter
from model_adapter.checkpoints.adapter import base_hash
from model_adapter.checkpoints.adapter_header import AdapterLayout, Base
from model_adapter.checkpoints.default_model import cached_path
from model_adapter.msa.config import LoadedModel
from model_adapter.msa.model import Decoder
from model_adapter.msa.prompt import PromptBuilder
from model_adapter.training import checkpoint as checkpoints
from model_adapter.training import corpus as corpora
from model_adapter.training.ahead import Ahead
from model_adapter.training.checkpoint import Checkpoint
from model_adapter.training.errors import CheckpointMismatchError
from model_adapter.training.evaluate import held_out_recall
from model_adapter.training.exporting import header_of
from model_adapter.training.hygiene import check_licence
from model_adapter.training.settings import Settings
from model_adapter.training.step import Step
from model_adapter.training.trainable import (
    Trainable,
    adapter_tensors,
    layout_of,
    prepare_model,
)
from storage.paths import DataFolder

log = logging.getLogger(__name__)

CLIP = 1.0
BETAS = (0.9, 0.98)
SCALE_RATE = 2e-2
#: The rate at the last step, as a share of the highest.
LAST_RATE = 0.03


@dataclass(frozen=True)
class Run:
    """Everything a run needs, loaded."""

    settings: Settings
    device: torch.device
    base: Base
    layout: AdapterLayout
    decoder: Decoder
    prompts: PromptBuilder
    trainable: Trainable
    corpus: corpora.Corpus


def load_base(settings: Settings) -> tuple[LoadedModel, Base]:
    """The base without an adapter, and what adapters call it. Raises CheckpointError."""
    data = DataFolder(settings.cache)
    model = load_engine_source(settings.base, data, "bf16", "none")
    path = cached_path(data) if settings.base == "default" else Path(settings.base)
    architecture = "qwen3" if model.config.qk_norm else "llama"
    return model, Base(model.display_name, base_hash(path), architecture)


def prepare(settings: Settings) -> Run:
    """Loads base and data. Raises TrainingError, CheckpointError."""
    name = settings.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Costs a twentieth of a step, and nothing here reads memory that it has not written.
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010 - untyped
    torch.set_float32_matmul_precision("high")
    for source in settings.sources:
        check_licence(source.name, source.licence)
    plain, base = load_base(settings)
    settings.run.mkdir(parents=True, exist_ok=True)
    layout = layout_of(settings, plain)
    model = prepare_model(plain, layout)
    decoder = Decoder(model, device)
    if device.type == "cuda" and settings.compile:
        decoder.compile()
    prompts = PromptBuilder(model.tokenizer, model.template)
    corpus = corpora.build(settings, prompts, device, base.sha256)
    trainable = Trainable(
        decoder, layout, settings.seed, value_routers=settings.router_init == "values"
    )
    return Run(settings, device, base, layout, decoder, prompts, trainable, corpus)


def optimiser_of(run: Run) -> torch.optim.AdamW:
    """Deltas, routers and the temperature, each with a rate of its own."""
    s, masters = run.settings, run.trainable.masters
    routers = [masters["router_q"], masters["router_k"]]
    deltas = [master for name, master in masters.items() if name[-2:] in (".a", ".b")]
    groups: list[dict[str, Any]] = [
        {"params": routers, "lr": s.router_rate, "weight_decay": s.weight_decay},
        {"params": [masters["scale"]], "lr": SCALE_RATE, "weight_decay": 0.0},
    ]
    if deltas:
        groups.append({"params": deltas, "lr": s.delta_rate, "weight_decay": s.weight_decay})
    for group in groups:
        group["highest"] = group["lr"]
    return torch.optim.AdamW(groups, betas=BETAS)


def rate_at(step: int, settings: Settings) -> float:
    """Share of the highest rate: up over the warm-up steps, then linearly down."""
    if step < settings.warm_up_steps:
        return (step + 1) / settings.warm_up_steps
    rest = max(settings.steps - settings.warm_up_steps, 1)
    return 1.0 - (1.0 - LAST_RATE) * (step - settings.warm_up_steps) / rest


def train(
    run: Run, journal: Journal, stop_after_s: float = math.inf, adapter: Path | None = None
) -> bool:
    """Makes the steps that are left, from the run folder's newest checkpoint on; False when
    it stopped at a checkpoint because the seconds were over.

    adapter: written at every checkpoint, so that there is one whatever ends the run.
    Raises CheckpointMismatchError when the newest is of other settings or another base.
    """
    s, trainable = run.settings, run.trainable
    optimiser = optimiser_of(run)
    first = _resume(run, optimiser)
    step_of = Step(run.decoder, s)
    started, tokens = time.monotonic(), 0
    ahead = Ahead(run.corpus, s, run.prompts, run.base.sha256, run.device)
    for step, batch in enumerate(ahead.batches(first), start=first):
        for group in optimiser.param_groups:
            group["lr"] = group["highest"] * rate_at(step, s)
        trainable.install()
        weights = s.losses.warm_up if step < s.warm_up_steps else s.losses.main
        outcome = step_of.run(batch, weights, trainable.scale)
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward([outcome.total])
        norm = torch.nn.utils.clip_grad_norm_(list(trainable.masters.values()), CLIP)
        optimiser.step()
        done = step + 1
        tokens += sum(sum(stream.lengths) for stream in batch.streams)
        if done % journal.every == 0 or done == s.steps:
            parts = {name: round(float(part), 4) for name, part in outcome.parts.items()}
            rate = tokens / (time.monotonic() - started)
            facts = {"queries": len(batch.positive_QD), "documents": batch.positive_QD.shape[1]}
            norms = {"norm": round(float(norm), 3), "scale": round(trainable.scale.item(), 2)}
            journal.step(done, {**parts, **norms, **facts, "tokens_per_s": round(rate)})
        over = time.monotonic() - started > stop_after_s
        if done % s.checkpoint_every == 0 or done == s.steps or over:
            _save(run, optimiser, done)
            if adapter is not None:
                header = header_of(s, run.base, run.layout, done, run.corpus.report)
                write_adapter(adapter, header, trainable.tensors(), int8=s.int8)
        if done % s.evaluate_every == 0 or done == s.steps:
            journal.write({"step": done, "held_out": evaluate(run, s.evaluated)})
        if over and done < s.steps:
            return False
    return True


def restore(run: Run) -> int:
    """Takes the newest checkpoint's values; its step, 0 without one."""
    return _resume(run, optimiser_of(run))


def evaluate(run: Run, questions: int = 0) -> dict[str, float]:
    """Recall of held-out questions with the masters as they are; of so many per set, 0 for all."""
    with torch.no_grad():
        run.trainable.install()
    head = run.prompts.template.head
    # Every batch of documents has a shape of its own here: nothing of it is worth compiling.
    with run.decoder.uncompiled():
        return held_out_recall(run.decoder, run.corpus, run.settings, head, questions)


def _resume(run: Run, optimiser: torch.optim.AdamW) -> int:
    path = checkpoints.latest(run.settings.run)
    if path is None:
        return 0
    held = checkpoints.load(path)
    if held.fingerprint != run.settings.fingerprint or held.base_sha256 != run.base.sha256:
        raise CheckpointMismatchError(
            f"{path} is of other settings or another base; give another run folder"
        )
    checkpoints.unpack(held, run.trainable.masters, optimiser)
    log.info("continuing behind step %d", held.step)
    return held.step


def _save(run: Run, optimiser: torch.optim.AdamW, step: int) -> None:
    tensors = checkpoints.pack(run.trainable.masters, optimiser)
    s = run.settings
    checkpoints.save(
        s.run, Checkpoint(step, s.fingerprint, run.base.sha256, run.corpus.report, tensors)
    )


def export(settings: Settings, path: Path) -> int:
    """Writes the newest checkpoint as an adapter file; the step it is of.

    Raises CheckpointMismatchError without a checkpoint, CheckpointError.
    """
    newest = checkpoints.latest(settings.run)
    if newest is None:
        raise CheckpointMismatchError(f"no checkpoint in {settings.run}")
    held = checkpoints.load(newest)
    model, base = load_base(settings)
    layout = layout_of(settings, model)
    if held.fingerprint != settings.fingerprint or held.base_sha256 != base.sha256:
        raise CheckpointMismatchError(f"{newest} is of other settings or another base")
    header = header_of(settings, base, layout, held.step, held.sources)
    tensors = adapter_tensors(checkpoints.masters_of(held), layout)
    write_adapter(path, header, tensors, int8=settings.int8)
    return held.step


class Journal:
    """run/log.jsonl, and a line that is rewritten on a terminal."""

    def __init__(self, path: Path, steps: int, every: int = 10) -> None:
        self.every = every
        self._path, self._steps = path, steps
        self._started = time.monotonic()

    def write(self, entry: dict[str, Any]) -> None:
        """Appends one line, with the seconds since the start."""
        entry = {"seconds": round(time.monotonic() - self._started, 1), **entry}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        if "held_out" in entry:
            log.info("%s", json.dumps(entry))

    def step(self, step: int, values: dict[str, Any]) -> None:
        """One step's values."""
        self.write({"step": step, **values})
        if sys.stderr.isatty():
            filled = "#" * (40 * step // self._steps)
            told = " ".join(f"{key} {values[key]}" for key in ("combined", "hits") if key in values)
            sys.stderr.write(f"\r[{filled:40}] {step}/{self._steps} {told}   ")
            sys.stderr.flush()
