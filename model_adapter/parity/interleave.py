"""interleave*.json: multi-round runs, replayed through the published loop's rules.

Scripted tokens ("forced") stand where the golden run was biased towards them; every
other golden token must be our own greedy choice, unless two are too close to tell. Rows
run in lock step here, as they did there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from model_adapter.parity.comparison import NO_SCORE, Comparison, Kind, decided
from model_adapter.parity.reference_loop import Call, Forward, ReferenceCrashError
from model_adapter.parity.reference_text import cut, prompt_row, regenerate
from model_adapter.parity.source import GoldenError, Setup, Source

#: A scenario that the reference itself did not survive is replayed for as long.
_MAX_FORWARDS = 1200


def compare_interleave(source: Source, stem: str) -> Comparison:
    """All scenarios of one file, round by round."""
    comparison = Comparison(source.tolerance(stem))
    scenarios = source.json(f"{stem}.json")
    tensors = source.tensors(f"{stem}.safetensors")
    if not isinstance(scenarios, dict) or not scenarios:
        raise GoldenError(f"{stem}.json: no scenarios")
    setup = source.setup(stem, scenarios)
    for scenario, content in scenarios.items():
        if not isinstance(content, dict) or "rounds" not in content:
            continue  # overrides of the whole file
        prompts: list[str] = list(content["questions"])
        for place, golden in enumerate(content["rounds"]):
            name = f"{scenario}.round{place}"
            comparison.equal(f"{name}.prompts", prompts, golden["prompts"])
            if "error" in golden:
                _replay_crash(comparison, setup, name, golden, source)
                break
            logits = tensors.get(f"{name}.raw_logits")
            prompts = _replay(comparison, setup, name, golden, logits)
    return comparison


def _replay(
    comparison: Comparison,
    setup: Setup,
    name: str,
    golden: Mapping[str, Any],
    logits: torch.Tensor | None,
) -> list[str]:
    """One call of the loop; returns the next round's prompts."""
    forwards = golden["forwards"]
    call = Call(
        setup,
        [prompt_row(setup.tokenizer, prompt) for prompt in golden["prompts"]],
        k=_top_k(setup, golden),
        new_tokens=len(forwards) - 1,
        golden_routing=_routing(golden["routing"]),
    )
    for key, ours in call.padded().items():
        comparison.equal(f"{name}.{key}", ours, golden[key])
    for place, entry in enumerate(forwards):
        forward = call.forward(entry["next"])
        if forward is None:
            comparison.mismatch(f"{name}: ended after {place} forwards, golden {len(forwards)}")
            break
        _check_forward(comparison, f"{name}.forward{place}", forward, entry)
        if logits is not None:
            live = [row for row in range(len(forward.live)) if forward.live[row]]
            comparison.tensor(
                Kind.LOGITS, f"{name}.forward{place}", forward.logits_BV[live], logits[place][live]
            )
    comparison.equal(f"{name}.ended", call.ended, True)
    _check_routing(comparison, call, name, golden["routing"])
    texts = call.texts()
    posts = [cut(text) for text in texts]
    following = [regenerate(post) for post in posts]
    if call.comparable_output:
        comparison.equal(f"{name}.generated_texts", texts, golden["generated_texts"])
    comparison.equal(f"{name}.post", posts, golden["post"])
    comparison.equal(f"{name}.regenerate", following, golden["regenerate"])
    kept = [row for row, prompt in enumerate(following) if prompt is not None]
    if "rows_kept" in golden:
        comparison.equal(f"{name}.rows_kept", kept, golden["rows_kept"])
    return [prompt for prompt in following if prompt is not None]


def _check_forward(
    comparison: Comparison, name: str, forward: Forward, entry: Mapping[str, Any]
) -> None:
    for row, live in enumerate(forward.live):
        if not live:
            continue
        for key, ours in (
            ("input_ids", forward.input_ids),
            ("position_ids", forward.position_ids),
            ("attention_mask", forward.attention_mask),
        ):
            comparison.equal(f"{name}.{key}[{row}]", ours[row], entry[key][row])
        free = entry["forced"][row] is None
        if free and decided(forward.logits_BV[row], comparison.tolerance.logits):
            token = int(forward.logits_BV[row].argmax())
            comparison.equal(f"{name}.next[{row}]", token, entry["next"][row])


def _top_k(setup: Setup, golden: Mapping[str, Any]) -> int:
    return int(golden["position_ids"][0][0]) - len(setup.head)


def _routing(raw: Mapping[str, Any]) -> list[dict[int, list[int]]]:
    """Per row: layer to the documents that the golden run selected, best first."""
    rows = len(next(iter(raw.values())))
    return [
        {
            int(layer): [
                n
                for n, score in zip(
                    entries[row]["topk_doc_ids"], entries[row]["topk_scores"], strict=True
                )
                if score > NO_SCORE
            ]
            for layer, entries in raw.items()
        }
        for row in range(rows)
    ]


def _check_routing(comparison: Comparison, call: Call, name: str, raw: Mapping[str, Any]) -> None:
    for row, golden in enumerate(_routing(raw)):
        for layer, documents in golden.items():
            ours, scores_N = call.ranking(row, layer, len(documents))
            where = f"{name}.layer{layer}[{row}]"
            comparison.ranking(where, ours, documents, scores_N)
            theirs = raw[str(layer)][row]["topk_scores"][: len(documents)]
            comparison.tensor(
                Kind.SCORES,
                where,
                torch.tensor([float(scores_N[n]) for n in documents]),
                torch.tensor(theirs),
            )


def _replay_crash(
    comparison: Comparison, setup: Setup, name: str, golden: Mapping[str, Any], source: Source
) -> None:
    """The reference fails where a long response has no marker: it then puts in an empty
    segment. Ours goes on; the replay must come to that very point."""
    rows = [prompt_row(setup.tokenizer, prompt) for prompt in golden["prompts"]]
    call = Call(setup, rows, k=_any_top_k(source), new_tokens=_MAX_FORWARDS)
    empty: list[list[int]] = [[] for _ in rows]
    comparison.equal(f"{name}.last_event", golden["last_event"].get("position_ids"), empty)
    words = [_longest_word(setup)] * call.batch
    try:
        while call.forward(words) is not None:
            pass
    except ReferenceCrashError:
        comparison.equal(f"{name}.empty_segment", call.empty_segment, True)
        comparison.notes.append(
            f"{name}: the reference fails after {golden['n_forward']} forwards and so does the "
            f"replay of its rules, after {call.forwards}; the engine generates on instead"
        )
        return
    comparison.mismatch(f"{name}: the replay never came to the empty segment")


def _longest_word(setup: Setup) -> int:
    """The token with most letters and no marker: a long response soon."""
    vocabulary = setup.tokenizer.get_vocab(with_added_tokens=False)
    letters = {word: token for word, token in vocabulary.items() if word.isalpha()}
    return letters[max(letters, key=len)]


def _any_top_k(source: Source) -> int:
    """Scenarios of one directory share their top_k; a crashed one does not tell it."""
    for path in sorted(source.folder.glob("interleave*.json")):
        for content in source.json(path.name).values():
            for golden in content.get("rounds", []) if isinstance(content, dict) else []:
                if "routing" in golden:
                    return len(next(iter(golden["routing"].values()))[0]["topk_doc_ids"])
    return 4
