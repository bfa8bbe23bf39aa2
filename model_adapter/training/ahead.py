"""Batches made ahead of their steps, in order, and brought to the device.

Making one is interpreted code for tens of milliseconds. In threads it takes the interpreter
from the step that is being launched, so that a GPU waits for both; processes of their own
read the prepared sets again and leave the step alone.
"""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer

from model_adapter.msa.prompt import PromptBuilder, Template
from model_adapter.training import corpus as corpora
from model_adapter.training.answers import AnswerRows
from model_adapter.training.batch import Batch, Batcher
from model_adapter.training.corpus import Corpus
from model_adapter.training.sampler import Sampler
from model_adapter.training.settings import Settings

#: Batches that are being made or wait, for each one that makes them.
AHEAD = 2
THREADS = 2


class Maker:
    """Makes the batch of any step: a function of the settings, the sets and the step alone."""

    def __init__(
        self, corpus: Corpus, settings: Settings, prompts: PromptBuilder, *, constant: bool
    ) -> None:
        """constant: every stream has the same number of tokens at every step."""
        head = prompts.template.head
        self._sampler = Sampler(corpus, settings, len(head))
        self._rows = AnswerRows(corpus, settings, prompts)
        self._batcher = Batcher(corpus, settings, head, constant=constant)

    def make(self, step: int) -> Batch:
        """On the CPU."""
        return self._batcher.make(self._sampler.draw(step), self._rows.draw(step))


#: Of this process, when it is one that makes batches.
_maker: list[Maker] = []


def _start(
    settings: Settings, base_sha256: str, tokenizer: str, template: Template, constant: bool
) -> None:
    torch.set_num_threads(1)
    prompts = PromptBuilder(Tokenizer.from_str(tokenizer), template)
    corpus = corpora.build(settings, prompts, torch.device("cpu"), base_sha256)
    _maker.append(Maker(corpus, settings, prompts, constant=constant))


def _make(step: int) -> Batch:
    return _maker[0].make(step)


@dataclass(frozen=True)
class Ahead:
    """Where batches come from. base_sha256: as `corpus.build` had it."""

    corpus: Corpus
    settings: Settings
    prompts: PromptBuilder
    base_sha256: str
    device: torch.device

    @property
    def _constant(self) -> bool:
        return self.device.type == "cuda"

    def batches(self, first: int) -> Iterator[Batch]:
        """Those of all steps from `first` on, on the device."""
        steps = self.settings.steps
        with self._pool() as (pool, make, makers):
            ahead: deque[Future[Batch]] = deque()
            for step in range(first, steps):
                while len(ahead) < AHEAD * makers and step + len(ahead) < steps:
                    ahead.append(pool.submit(make, step + len(ahead)))
                yield ahead.popleft().result().to(self.device)

    @contextmanager
    def _pool(self) -> Iterator[tuple[Executor, Callable[[int], Batch], int]]:
        settings, prompts = self.settings, self.prompts
        pool: Executor
        if settings.batch_processes:
            start = (settings, self.base_sha256, prompts.tokenizer.to_str(), prompts.template)
            with ProcessPoolExecutor(
                settings.batch_processes,
                multiprocessing.get_context("spawn"),
                _start,
                (*start, self._constant),
            ) as pool:
                yield pool, _make, settings.batch_processes
        else:
            maker = Maker(self.corpus, settings, prompts, constant=self._constant)
            with ThreadPoolExecutor(THREADS) as pool:
                yield pool, maker.make, THREADS
