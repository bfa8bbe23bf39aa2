"""A line chart as SVG: shares over a logarithmic axis. Readable on light and dark pages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

#: x and y of a point; y between 0 and 1.
Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 56, 120, 40, 48
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
_GREY = "#888888"


def shares(
    title: str, x_label: str, ticks: Mapping[str, float], lines: Mapping[str, Points]
) -> str:
    """The chart of `lines` by name, whose x lie between the first and last of the ticks."""
    low, high = math.log(min(ticks.values())), math.log(max(ticks.values()))

    def x(value: float) -> float:
        share = (math.log(value) - low) / (high - low) if high > low else 0.5
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    parts = [_text(LEFT, 22, title, "start", size=15), *_grid()]
    for name, value in ticks.items():
        parts.append(_line(x(value), HEIGHT - BOTTOM, x(value), HEIGHT - BOTTOM + 5))
        parts.append(_text(x(value), HEIGHT - BOTTOM + 20, name))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x_label))
    labels = _apart({name: _y(points[-1][1]) for name, points in lines.items() if points})
    for place, (name, points) in enumerate(lines.items()):
        if points:
            spots = [(x(value), _y(share)) for value, share in points]
            parts += _series(name, spots, labels[name], _COLOURS[place % len(_COLOURS)])
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title, {chr(34): "&quot;"})}" font-family="sans-serif">\n'
        f"{body}\n</svg>\n"
    )


def _y(share: float) -> float:
    return TOP + (1 - share) * (HEIGHT - TOP - BOTTOM)


def _grid() -> list[str]:
    parts = []
    for fifth in range(6):
        y = _y(fifth / 5)
        parts.append(_line(LEFT, y, WIDTH - RIGHT, y, opacity=0.35))
        parts.append(_text(LEFT - 8, y + 4, f"{fifth / 5:.1f}", "end"))
    return parts


def _series(
    name: str, spots: Sequence[tuple[float, float]], label_y: float, colour: str
) -> list[str]:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
    dots = [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>' for x, y in spots]
    return [
        f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>',
        *dots,
        _text(spots[-1][0] + 10, label_y + 4, name, "start", colour=colour),
    ]


def _apart(wanted: Mapping[str, float], gap: float = 15) -> dict[str, float]:
    """Heights of labels, moved down where two would overlap."""
    placed: dict[str, float] = {}
    last = -math.inf
    for name, y in sorted(wanted.items(), key=lambda item: item[1]):
        last = placed[name] = max(y, last + gap)
    return placed


def _line(x1: float, y1: float, x2: float, y2: float, opacity: float = 1.0) -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" '
        f'stroke="{_GREY}" stroke-opacity="{opacity}"/>'
    )


def _text(
    x: float, y: float, text: str, anchor: str = "middle", *, size: int = 12, colour: str = _GREY
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" '
        f'fill="{colour}">{escape(text)}</text>'
    )
