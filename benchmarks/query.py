"""Query speed by size of memory, and against putting the same text in the prompt.

    python -m benchmarks.query --json

Memories of 1K, 16K, 128K and 1M tokens of generated conversation are filled through the
service. The server is then started afresh: the first query to each memory is `cold`
(paged in from LMDB, the file in the operating system's cache), those after it are
`resident`. Times are the worker's own, from arrival to first token, and medians over the
questions; `client_first_text_ms` is what a client sees. `in_prompt` is the same model
given the same text in its prompt, where its context holds it. `growth` is the resident
time to first token without the routing product, largest memory over 16K. `peak_mib` is the
most that the server (`itself`) and its worker (`children`) held while filling, and from their
start afresh until the last answer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.ingest import TURNS_PER_APPEND, as_source, as_turn, wait_encoded
from benchmarks.machine import machine
from benchmarks.peak import peak_mib
from benchmarks.service import MODEL_CACHE, Service, running
from benchmarks.workload import conversation
from memsvc.client import Client, Done, DoneReason, Generation, TextDelta, Turn, Usage
from storage import documents
from storage.paths import DataFolder

if TYPE_CHECKING:
    from model_adapter.msa.model import Decoder

SIZES = {"1K": 1_000, "16K": 16_000, "128K": 128_000, "1M": 1_000_000}
QUESTIONS = (
    "What did Mara repair in Lisbon?",
    "Who bought a telescope, and for how much?",
    "What happened with the garden fence in Turin?",
    "Which thing did Emil lose?",
    "How much did the sourdough starter cost?",
    "What was painted at the lake house?",
)
ANSWER_TOKENS = 24
#: Turns that tell how many tokens a turn has.
PROBE_TURNS = 10


def fill(client: Client, name: str, tokens: int) -> dict[str, object]:
    """Appends until the memory has at least `tokens` tokens; all are encoded then."""
    client.memories.create(name)
    memory, lines = client.memory(name), conversation(11, 10_000_000)
    started = time.perf_counter()
    encoded = 0
    while encoded < tokens:
        if encoded:
            per_turn = encoded / client.memories.get(name).document_count
            missing = int((tokens - encoded) / per_turn) + 1
        else:
            missing = PROBE_TURNS
        revision = 0
        while missing > 0:
            turns = [as_turn(line) for line in islice(lines, min(missing, TURNS_PER_APPEND))]
            revision = memory.append(turns).revision
            missing -= len(turns)
        wait_encoded(client, name, revision)
        encoded = client.memories.get(name).encodings[0].tokens
    held = client.memories.get(name)
    return {
        "tokens": encoded,
        "documents": held.document_count,
        "block_bytes_per_token": round(held.encodings[0].bytes / encoded, 1),
        "fill_s": round(time.perf_counter() - started, 1),
    }


def ask(client: Client, name: str, question: str) -> dict[str, float]:
    """One query's times in milliseconds."""
    started = time.perf_counter()
    first: float | None = None
    usage: Usage | None = None
    ended: Done | None = None
    for event in client.memory(name).query(question, options=Generation(ANSWER_TOKENS)):
        if isinstance(event, TextDelta) and first is None:
            first = (time.perf_counter() - started) * 1000
        if isinstance(event, Usage):
            usage = event
        if isinstance(event, Done):
            ended = event
    assert usage is not None and ended is not None
    # A model that ends its answer takes one more step, to say so.
    later = max(usage.answer_tokens - (ended.reason is not DoneReason.STOP), 1)
    return {
        "first_token_ms": usage.time_to_first_token_ms,
        "per_token_ms": (usage.total_ms - usage.time_to_first_token_ms) / later,
        "routing_ms": usage.routing_ms,
        "page_in_ms": usage.page_in_ms,
        "client_first_text_ms": first or 0.0,
    }


def _median(runs: list[dict[str, float]]) -> dict[str, float]:
    return {key: round(statistics.median(run[key] for run in runs), 2) for key in runs[0]}


def measure(service: Service, names: list[str]) -> dict[str, dict[str, dict[str, float]]]:
    """Cold and resident times of each memory."""
    results = {}
    with service.client() as client:
        client.memories.create("warm")
        wait_encoded(client, "warm", client.memory("warm").append(_warm_turns()).revision)
        ask(client, "warm", QUESTIONS[0])
        for name in names:
            cold = ask(client, name, QUESTIONS[0])
            resident = [ask(client, name, question) for question in QUESTIONS]
            results[name] = {"cold": _median([cold]), "resident": _median(resident)}
    return results


def _warm_turns() -> list[Turn]:
    return [as_turn(line) for line in conversation(3, 20)]


def in_prompt(model: str, sizes: dict[str, int]) -> dict[str, dict[str, float]]:
    """Prefill and decode with the whole text in the prompt, for each size that fits."""
    import torch  # noqa: PLC0415  # the service side of this benchmark runs without it

    from model_adapter.checkpoints import load_engine_source  # noqa: PLC0415
    from model_adapter.msa.model import Decoder  # noqa: PLC0415
    from model_adapter.msa.prompt import PromptBuilder  # noqa: PLC0415

    loaded = load_engine_source(model, DataFolder(MODEL_CACHE.parent))
    prompts = PromptBuilder(loaded.tokenizer, loaded.template)
    positions = loaded.config.max_positions
    results = {}
    with torch.inference_mode():
        decoder = Decoder(loaded, torch.device("cpu"))
        for name, tokens in sizes.items():
            if tokens + ANSWER_TOKENS + 256 > positions:
                continue
            text: list[list[int]] = []
            for number, line in enumerate(conversation(11, tokens), start=1):
                if sum(map(len, text)) >= tokens:
                    break
                text.append(prompts.cited(number, documents.render(as_source(line))))
            rows = [prompts.chat(text, question) for question in QUESTIONS[:3]]
            _generate(decoder, rows[0])  # warms up
            results[name] = _median([_generate(decoder, row) for row in rows])
    return results


def _generate(decoder: Decoder, ids: list[int]) -> dict[str, float]:
    from model_adapter.msa.forward import Segment, new_row, run  # noqa: PLC0415

    row, pending, moments = new_row(decoder), ids, [time.perf_counter()]
    for _ in range(ANSWER_TOKENS):
        logits = run(decoder, [Segment(row, pending)]).logits
        assert logits is not None
        pending = [int(logits[0].argmax())]
        moments.append(time.perf_counter())
    return {
        "prompt_tokens": len(ids),
        "first_token_ms": (moments[1] - moments[0]) * 1000,
        "per_token_ms": (moments[-1] - moments[1]) / (ANSWER_TOKENS - 1) * 1000,
    }


def _in_prompt_apart(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    command = [sys.executable, "-m", "benchmarks.query", "--prompt-only", "--model"]
    reply = subprocess.run(
        [*command, arguments.model, "--sizes", arguments.sizes],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    figures: dict[str, dict[str, float]] = json.loads(reply.stdout)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="default")
    parser.add_argument("--sizes", default=",".join(SIZES), help="of " + ", ".join(SIZES))
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--prompt-only", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sizes = {name: SIZES[name] for name in arguments.sizes.split(",")}
    if arguments.prompt_only:
        print(json.dumps(in_prompt(arguments.model, sizes)))
        return
    ids = {name: f"size-{name.lower()}" for name in sizes}
    peaks = {}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        with running(data, arguments.model) as service, service.client() as client:
            held = {name: fill(client, ids[name], tokens) for name, tokens in sizes.items()}
            peaks["filling"] = peak_mib(service.process)
        with running(data, arguments.model) as service:
            times = measure(service, list(ids.values()))
            peaks["asking"] = peak_mib(service.process)
    prompt = _in_prompt_apart(arguments)
    figures = {
        "machine": machine(),
        "model": arguments.model,
        "memories": {
            name: {**held[name], **times[ids[name]], "in_prompt": prompt.get(name)}
            for name in sizes
        },
        "peak_mib": peaks,
        "growth": growth([times[ids[name]]["resident"] for name in sizes if name != "1K"]),
    }
    print(json.dumps(figures) if arguments.json else json.dumps(figures, indent=2))


def growth(resident: list[dict[str, float]]) -> float | None:
    """Time to first token without routing: the last memory over the first."""
    if len(resident) < 2:
        return None
    rest = [times["first_token_ms"] - times["routing_ms"] for times in resident]
    return round(rest[-1] / rest[0], 3)


if __name__ == "__main__":
    main()
