"""One ranking out of two: routing's own, and that of the question's words.

Scores of the two have nothing in common, so each list's are spread over 0 to 1 for this
question and then added by weight. A document that only one list has counts 0 in the other.
"""

from __future__ import annotations

from collections.abc import Mapping

#: Documents of either list that take part, at least: as many as are asked for if that is more.
DEPTH = 50


def blend(
    routed: Mapping[int, float], lexical: Mapping[int, float], weight: float, limit: int
) -> list[tuple[int, float]]:
    """(document, score in 0..1) of the best `limit`, best first; ties go to the lower one.

    weight: share of the lexical list, 0 to 1.
    """
    by_routing, by_words = _spread(routed), _spread(lexical)
    total = {
        n: (1 - weight) * by_routing.get(n, 0.0) + weight * by_words.get(n, 0.0)
        for n in by_routing.keys() | by_words.keys()
    }
    return sorted(total.items(), key=lambda item: (-item[1], item[0]))[:limit]


def _spread(scores: Mapping[int, float]) -> dict[int, float]:
    """The best is 1 and the worst 0; equal ones are all 1."""
    if not scores:
        return {}
    low, high = min(scores.values()), max(scores.values())
    width = high - low
    return {n: (score - low) / width if width > 0 else 1.0 for n, score in scores.items()}
