"""Line charts as SVG: without a library, without a script, without anything to download.

Every text in a chart is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import msgspec
from markupsafe import Markup

_WIDTH, _HEIGHT = 880, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 10, 28
# More points than pixels would only make the file larger.
_MOST_POINTS = 1200
_TICKS = 5


class Series(msgspec.Struct, frozen=True):
    """One line: its name, its points in the order of x, and the CSS class with its colour."""

    name: str
    points: Sequence[tuple[float, float]]
    style: str


def lines(title: str, series: Sequence[Series], *, highest: float | None = None) -> Markup:
    """Draw several lines over one x axis.

    Args:
        title: the text for screen readers.
        series: the lines; points that are not finite are left out.
        highest: the y at which lines with rare peaks are cut off.
    """
    drawn = [Series(s.name, _drawable(s.points, highest), s.style) for s in series]
    points = [point for one in drawn for point in one.points]
    if not points:
        return Markup('<p class="none">nothing to draw yet</p>')
    scale = _Scale.around(points)
    parts = [
        Markup('<svg viewBox="0 0 {} {}" role="img"><title>{}</title>').format(_WIDTH, _HEIGHT, title),
        *_axes(scale),
        *(_polyline(one, scale) for one in drawn),
        Markup('</svg><p class="legend">'),
        *(Markup('<span class="key {}">{}</span>').format(one.style, one.name) for one in drawn),
        Markup("</p>"),
    ]
    return Markup("").join(parts)


class _Scale(msgspec.Struct, frozen=True):
    """The values at the edges of the chart, and the y at which the grid has lines."""

    x_low: float
    x_high: float
    y_ticks: list[float]

    @classmethod
    def around(cls, points: Sequence[tuple[float, float]]) -> _Scale:
        x_low, x_high = _span([x for x, _ in points])
        return cls(x_low, x_high, _ticks(*_span([y for _, y in points])))

    def x(self, value: float) -> float:
        return _LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return _HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)


def _axes(scale: _Scale) -> Iterator[Markup]:
    for value in scale.y_ticks:
        y = scale.y(value)
        yield Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(
            _LEFT, _WIDTH - _RIGHT, y, y
        )
        yield Markup('<text x="{}" y="{:.1f}" text-anchor="end">{:.4g}</text>').format(
            _LEFT - 8, y + 4, value
        )
    for value in _ticks(scale.x_low, scale.x_high):
        if scale.x_low <= value <= scale.x_high:
            yield Markup('<text x="{:.1f}" y="{}" text-anchor="middle">{:.6g}</text>').format(
                scale.x(value), _HEIGHT - 8, value
            )


def _polyline(series: Series, scale: _Scale) -> Markup:
    points = " ".join(f"{scale.x(x):.1f},{scale.y(y):.1f}" for x, y in series.points)
    return Markup('<polyline class="{}" points="{}"><title>{}</title></polyline>').format(
        series.style, points, series.name
    )


def _drawable(points: Sequence[tuple[float, float]], highest: float | None) -> list[tuple[float, float]]:
    """The finite points, cut off at ``highest``. When there are too many, the extremes of each stretch."""
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
    """Round numbers at equal distances, from at most ``low`` to at least ``high``."""
    rough = (high - low) / _TICKS
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]
