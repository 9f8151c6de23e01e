"""Line charts as SVG text: no library, no script, nothing to fetch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import msgspec

_WIDTH, _HEIGHT = 880, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 10, 28
# A line of more points than pixels only makes the file larger.
_MOST_POINTS = 1200
_TICKS = 5


class Series(msgspec.Struct, frozen=True):
    """One line: its name, its points in the order of x, and the CSS class that colours it."""

    name: str
    points: Sequence[tuple[float, float]]
    style: str


def lines(title: str, series: Sequence[Series], *, highest: float | None = None) -> str:
    """A chart of several lines over one x axis.

    Args:
        title: what a screen reader says.
        series: the lines; points that are not finite are left out.
        highest: where y is cut off, for lines with rare peaks.
    """
    drawn = [Series(s.name, _drawable(s.points, highest), s.style) for s in series]
    points = [point for one in drawn for point in one.points]
    if not points:
        return "<p class=none>nothing to draw yet</p>"
    x_low, x_high = _span([x for x, _ in points])
    y_ticks = _ticks(*_span([y for _, y in points]))
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def x_at(x: float) -> float:
        return _LEFT + (x - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT)

    def y_at(y: float) -> float:
        return _HEIGHT - _BOTTOM - (y - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img"><title>{escape(title)}</title>']
    for y in y_ticks:
        at = y_at(y)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{y:.4g}</text>')
    for x in _ticks(x_low, x_high):
        if x_low <= x <= x_high:
            at = x_at(x)
            parts.append(f'<text x="{at:.1f}" y="{_HEIGHT - 8}" text-anchor="middle">{x:.6g}</text>')
    for one in drawn:
        path = " ".join(f"{x_at(x):.1f},{y_at(y):.1f}" for x, y in one.points)
        parts.append(
            f'<polyline class="{one.style}" points="{path}"><title>{escape(one.name)}</title></polyline>'
        )
    parts.append("</svg>")
    legend = "".join(f'<span class="key {one.style}">{escape(one.name)}</span>' for one in drawn)
    return "".join(parts) + f"<p class=legend>{legend}</p>"


def _drawable(points: Sequence[tuple[float, float]], highest: float | None) -> list[tuple[float, float]]:
    """Finite points, cut off above, and no more of them than can be seen: of each stretch the extremes."""
    finite = [(x, y if highest is None else min(y, highest)) for x, y in points if math.isfinite(y)]
    if len(finite) <= _MOST_POINTS:
        return finite
    length = math.ceil(len(finite) / (_MOST_POINTS // 2))
    kept = []
    for start in range(0, len(finite), length):
        stretch = finite[start : start + length]
        extremes = {min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])}
        kept += sorted(extremes)
    return kept


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if high > low:
        return low, high
    around = abs(low) / 10 or 1.0
    return low - around, high + around


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers at equal distances that take in both ends."""
    rough = (high - low) / _TICKS
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]
