"""Line charts: what is drawn of a series, and that no text in it becomes markup."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree

import pytest
from markupsafe import Markup

from kohya_mps.train import svg_chart
from kohya_mps.train.svg_chart import Series


def drawn_points(chart: Markup) -> list[tuple[float, float]]:
    """The points of the first line, in pixels."""
    pairs = re.findall(r'points="([^"]+)"', chart)[0].split()
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in pairs)]


def test_a_chart_leaves_out_what_is_not_finite() -> None:
    drawn = svg_chart.lines("t", [Series("s", [(1, 1.0), (2, math.nan), (3, math.inf), (4, 2.0)], "one")])

    assert len(drawn_points(drawn)) == 2
    assert "nan" not in drawn
    assert "inf" not in drawn


def test_a_chart_of_many_points_keeps_the_peaks() -> None:
    values = [(n, 100.0 if n == 77_777 else 1.0 + n % 2) for n in range(100_000)]

    drawn = svg_chart.lines("t", [Series("s", values, "one")])

    points = drawn_points(drawn)
    assert len(points) < 2000
    assert min(y for _, y in points) < 15


def test_a_constant_is_a_level_line() -> None:
    drawn = svg_chart.lines("t", [Series("s", [(1, 3.0), (2, 3.0)], "one")])

    assert len({y for _, y in drawn_points(drawn)}) == 1


def test_the_line_spans_the_chart_and_higher_values_are_higher_up() -> None:
    points = drawn_points(svg_chart.lines("t", [Series("s", [(0, 0.0), (5, 5.0), (10, 10.0)], "one")]))

    (left, bottom), (middle_x, middle_y), (right, top) = points
    assert (left, right) == (64.0, 868.0)
    assert (top, bottom) == (10.0, 232.0)
    assert middle_x == pytest.approx((left + right) / 2)
    assert middle_y == pytest.approx((top + bottom) / 2)


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0.0, 10.0, ["0", "2", "4", "6", "8", "10"]),
        (0.0, 1.0, ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
        (0.03, 0.21, ["0", "0.05", "0.1", "0.15", "0.2", "0.25"]),
        (-3.0, 4.0, ["-4", "-2", "0", "2", "4"]),
    ],
)
def test_the_grid_has_round_numbers_that_include_both_ends(
    low: float, high: float, labels: list[str]
) -> None:
    drawn = svg_chart.lines("t", [Series("s", [(1, low), (2, high)], "one")])

    assert re.findall(r'text-anchor="end">([^<]+)<', drawn) == labels


def test_a_peak_is_cut_off_where_the_caller_says() -> None:
    points = [(n, 50.0 if n == 5 else 1.0) for n in range(10)]

    labels = re.findall(
        r'text-anchor="end">([^<]+)<', svg_chart.lines("t", [Series("s", points, "one")], highest=3.0)
    )

    assert max(map(float, labels)) == 3.0


def test_without_points_it_says_so() -> None:
    assert "nothing to draw yet" in svg_chart.lines("t", [Series("s", [(1, math.nan)], "one")])


def test_texts_in_a_chart_cannot_become_markup() -> None:
    hostile = """<script>alert("it's & it")</script>"""

    drawn = svg_chart.lines(hostile, [Series(hostile, [(1, 1.0), (2, 2.0)], "one")])

    root = ElementTree.fromstring(f"<p>{drawn}</p>")
    assert root.find(".//script") is None
    assert [title.text for title in root.iter("title")] == [hostile, hostile]
